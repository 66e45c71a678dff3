"""A small Hub on loopback that checks what the client sends, and fails on demand.

It speaks what ``huggingface_hub`` needs for model repositories: create, info, card validation, preupload, LFS batch and
basic upload, commit (ndjson), tree listing, and downloads with ETag. Anything else, or anything malformed, is answered
with an error and noted in ``complaints``, which the fixture expects to be empty at the end of a test.
"""

from __future__ import annotations

import re
import threading
from http.server import ThreadingHTTPServer
from typing import Any

from .handler import Handler
from .repositories import TOKEN, Commit, Failure, Repo, Stored

__all__ = ["TOKEN", "Commit", "Failure", "HubServer", "Repo", "Stored"]


class HubServer:
    """Start with ``with HubServer() as hub``; ``hub.url`` is its endpoint."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.complaints: list[str] = []
        self.lfs_above = 1 << 10  # bytes: larger .safetensors and .pt files go through LFS
        self.page = 1000
        self.token: str | None = TOKEN
        self.read_only: set[str] = set()
        self._failures: list[Failure] = []
        self.lock = threading.RLock()
        self.released = threading.Event()  # set: hanging answers end
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"server_hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    # ---- what tests say ----------------------------------------------------------------------------------------------
    def fail(self, method: str, path: str, status: int | None = None, **options: Any) -> Failure:
        """Makes requests fail whose method equals and whose path matches (a regular expression, from anywhere)."""
        failure = Failure(method, re.compile(path), status, **options)
        with self.lock:
            self._failures.append(failure)
        return failure

    def heal(self) -> None:
        with self.lock:
            self._failures.clear()

    def count(self, method: str, path: str) -> int:
        with self.lock:
            return sum(m == method and re.search(path, p) is not None for m, p in self.requests)

    def add_repo(self, name: str, files: dict[str, bytes] | None = None, private: bool = True) -> Repo:
        """A repository as the Hub makes it: one commit, here with ``files`` as well."""
        repo = self.repos[name] = Repo(private)
        stored = {
            p: Stored(d, len(d) > self.lfs_above and not p.endswith((".md", ".json"))) for p, d in (files or {}).items()
        }
        repo.add_commit(
            "initial commit", {".gitattributes": Stored(b"*.safetensors filter=lfs\n", False), **stored}, []
        )
        return repo

    def take_failure(self, method: str, path: str) -> Failure | None:
        with self.lock:
            self.requests.append((method, path))
            for failure in self._failures:
                if failure.times and failure.method == method and failure.path.search(path):
                    failure.times -= 1
                    return failure
        return None
