"""One request to the server."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlparse

from .repositories import REGULAR_LIMIT, Answer, Commit, Repo, Stored

if TYPE_CHECKING:
    from . import HubServer


class Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"
    # Without it, headers and body go out apart and every answer waits for the other side's delayed acknowledgement.
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_HEAD = do_GET

    def _serve(self) -> None:
        hub = self.server_hub
        self.cut_body = False
        path = unquote(urlparse(self.path).path)
        failure = hub.take_failure(self.command, path)
        try:
            body = self._body()
            if failure and failure.hang:
                hub.released.wait()
                self.close_connection = True
                return
            if failure and failure.slow:
                time.sleep(failure.slow)
            if failure and failure.cut == "before":
                self.close_connection = True
                return
            if failure and failure.status:
                self._reply(failure.status, json.dumps({"error": "injected"}).encode(), failure.headers)
                return
            self.cut_body = bool(failure and failure.cut == "body")
            if failure and failure.cut == "after":
                self._reply = lambda *a, **k: None  # type: ignore[method-assign]
                self.close_connection = True
            self._route(path, body)
        except Answer as answer:
            headers = {"X-Error-Message": answer.message} if answer.message else {}
            if answer.code:
                headers["X-Error-Code"] = answer.code
            self._reply(answer.status, json.dumps({"error": answer.message}).encode(), headers)
        except ConnectionError:
            self.close_connection = True

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _reply(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        self.send_response(status)
        fields = {"Content-Type": "application/json", "Content-Length": str(len(body) if length is None else length)}
        for key, value in {**fields, **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            if self.cut_body:
                body, self.close_connection = body[: len(body) // 2], True
            self.wfile.write(body)
        self.wfile.flush()

    def _json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        self._reply(200, json.dumps(value).encode(), headers)

    def _complain(self, text: str) -> Answer:
        self.server_hub.complaints.append(f"{self.command} {self.path}: {text}")
        return Answer(400, text)

    def _expect(self, condition: object, text: str) -> None:
        if not condition:
            raise self._complain(text)

    # ---- routes ------------------------------------------------------------------------------------------------------
    def _route(self, path: str, body: bytes) -> None:
        name = r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)"
        routes: list[tuple[str, str, Callable[..., None]]] = [
            ("POST", r"/api/repos/create", self._create),
            (
                "GET",
                r"/api/agent-harnesses",
                self._nothing,
            ),  # newer clients ask once for what they report themselves as
            ("POST", r"/api/validate-yaml", self._validate_card),
            ("GET", rf"/api/models/{name}", self._info),
            ("GET", rf"/api/models/{name}/revision/(?P<revision>.+)", self._info),
            ("POST", rf"/api/models/{name}/preupload/(?P<revision>.+)", self._preupload),
            ("POST", rf"/api/models/{name}/commit/(?P<revision>.+)", self._commit),
            ("GET", rf"/api/models/{name}/tree/(?P<revision>[^/]+)", self._tree),
            ("POST", rf"/{name}\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", self._put_object),
            ("HEAD", rf"/{name}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self._resolve),
            ("GET", rf"/{name}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self._resolve),
        ]
        for method, pattern, handler in routes:
            match = re.fullmatch(pattern, path)
            if match and method == self.command:
                with self.server_hub.lock:
                    handler(body, **match.groupdict())
                return
        raise self._complain("no such route")

    def _nothing(self, body: bytes) -> None:
        raise Answer(404, "Not found")

    def _authorized(self) -> bool:
        given = self.headers.get("Authorization")
        if given and given != f"Bearer {self.server_hub.token}":
            raise Answer(401, "Invalid credentials in Authorization header")
        return given is not None

    def _repo(self, repo: str, revision: str | None = None, write: bool = False) -> tuple[Repo, Commit]:
        authorized = self._authorized()
        found = self.server_hub.repos.get(repo)
        if found is None or (found.private and not authorized):
            raise Answer(404 if authorized else 401, "Repository not found", "RepoNotFound")
        if write and (not authorized or repo in self.server_hub.read_only):
            raise Answer(403 if authorized else 401, "You don't have the rights to write there")
        for commit in reversed(found.commits):
            if revision in (None, "main", commit.oid):
                return found, commit
        raise Answer(404, "Invalid rev id", "RevisionNotFound")

    def _create(self, body: bytes) -> None:
        hub = self.server_hub
        if not self._authorized():
            raise Answer(401, "Invalid username or password.")
        asked = json.loads(body)
        self._expect(asked.get("type") in (None, "model"), "only model repositories")
        self._expect(re.fullmatch(r"[\w.-]{1,96}", asked["name"]), "repository name")
        owner = asked.get("organization") or "user"
        if owner == "stranger":
            raise Answer(403, "You don't have the rights to create a model under the namespace")
        name = f"{owner}/{asked['name']}"
        url = f"{hub.url}/{name}"
        if name in hub.repos:
            self._reply(409, json.dumps({"error": "You already created this model repo", "url": url}).encode())
            return
        # The client's releases say `private` or `visibility`.
        hub.add_repo(name, private=asked.get("visibility") == "private" or asked.get("private") is True)
        self._json({"url": url, "name": name})

    def _validate_card(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        front = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        base = re.search(r"^base_model: (.*)$", front[1], re.MULTILINE) if front else None
        if front is None or (base and not re.fullmatch(r"[\w.-]+/[\w.-]+", base[1])):
            message = '"base_model" is not a valid model' if front else "no metadata"
            self._reply(400, json.dumps({"errors": [{"message": message}], "warnings": []}).encode())
            return
        self._json({"errors": [], "warnings": []})

    def _info(self, body: bytes, repo: str, revision: str | None = None) -> None:
        found, commit = self._repo(repo, revision)
        files = [{"rfilename": path} for path in commit.files]
        self._json({"id": repo, "sha": commit.oid, "private": found.private, "tags": [], "siblings": files})

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        _, commit = self._repo(repo, revision, write=True)
        answers = []
        for file in json.loads(body)["files"]:
            self._expect(set(file) >= {"path", "sample", "size"}, "preupload fields")
            self._expect(len(base64.b64decode(file["sample"])) <= 512, "sample")
            lfs = file["path"].endswith((".safetensors", ".pt")) and file["size"] > self.server_hub.lfs_above
            old = commit.files.get(file["path"])
            answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            answers.append({**answer, **({"oid": old.etag} if old else {})})
        self._json({"files": answers, "commitOid": commit.oid})

    def _batch(self, body: bytes, repo: str) -> None:
        hub = self.server_hub
        self._repo(repo, write=True)
        asked = json.loads(body)
        self._expect(asked["operation"] == "upload" and asked["hash_algo"] == "sha256", "LFS operation")
        self._expect("basic" in asked["transfers"], "basic transfer")
        answers = []
        for item in asked["objects"]:
            answer: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in hub.objects:
                answer["actions"] = {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}
            answers.append(answer)
        self._json({"transfer": "basic", "objects": answers})

    def _put_object(self, body: bytes, oid: str) -> None:
        self._expect("Authorization" not in self.headers, "the token went to the storage host")
        self._expect(hashlib.sha256(body).hexdigest() == oid, "the object's hash differs")
        self.server_hub.objects[oid] = body
        self._reply(200, b"")

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        hub = self.server_hub
        found, commit = self._repo(repo, revision, write=True)
        self._expect(self.headers["Content-Type"] == "application/x-ndjson", "content type")
        lines = [json.loads(line) for line in body.splitlines()]
        self._expect(lines and lines[0]["key"] == "header" and lines[0]["value"]["summary"], "header line")
        add: dict[str, Stored] = {}
        delete: list[str] = []
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            path = value["path"]
            self._expect(not re.search(r"(^|/)\.\.?(/|$)|^/|\\", path), "path")
            if key == "file":
                self._expect(value["encoding"] == "base64", "encoding")
                data = base64.b64decode(value["content"], validate=True)
                self._expect(len(data) <= REGULAR_LIMIT, "a large file was sent inline")
                add[path] = Stored(data, lfs=False)
            elif key == "lfsFile":
                self._expect(value["algo"] == "sha256" and value["oid"] in hub.objects, "an LFS object is missing")
                data = hub.objects[value["oid"]]
                self._expect(len(data) == value["size"], "the LFS object's size differs")
                add[path] = Stored(data, lfs=True)
            elif key == "deletedFile":
                if path not in commit.files:
                    raise Answer(404, "A file with this name doesn't exist", "EntryNotFound")
                delete.append(path)
            else:
                raise self._complain(f"unknown operation {key!r}")
        made = found.add_commit(lines[0]["value"]["summary"], add, delete)
        self._json({"success": True, "commitOid": made.oid, "commitUrl": f"{hub.url}/{repo}/commit/{made.oid}"})

    def _tree(self, body: bytes, repo: str, revision: str) -> None:
        _, commit = self._repo(repo, revision)
        query = parse_qs(urlparse(self.path).query)
        start = int(query.get("cursor", ["0"])[0])
        entries: list[dict[str, Any]] = []
        for folder in sorted({path.rpartition("/")[0] for path in commit.files} - {""}):
            entries.append({"type": "directory", "path": folder, "oid": "0" * 40, "size": 0})
        for path, file in sorted(commit.files.items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(file.data), "oid": file.oid}
            if file.lfs:
                entry["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": 134}
            entries.append(entry)
        stop = start + self.server_hub.page
        headers = {}
        if stop < len(entries):
            next_page = f"{self.server_hub.url}/api/models/{repo}/tree/{revision}?recursive=True&cursor={stop}"
            headers["Link"] = f'<{next_page}>; rel="next"'
        self._json(entries[start:stop], headers)

    def _resolve(self, body: bytes, repo: str, revision: str, file: str) -> None:
        _, commit = self._repo(repo, revision)
        stored = commit.files.get(file)
        if stored is None:
            self._reply(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.oid})
            return
        data, status = stored.data, 200
        headers = {"ETag": f'"{stored.etag}"', "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted and self.command == "GET":
            first = int(wanted[1])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            data, status = data[first:], 206
        self._reply(status, data, headers)
