"""What the server keeps, and what it is told to do wrong."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field

TOKEN = "hf_test_token"
REGULAR_LIMIT = 10 << 20  # bytes: larger files are never committed inline


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Stored:
    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        return git_hash(self.data)

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass
class Commit:
    oid: str
    summary: str
    added: list[str]
    deleted: list[str]
    files: dict[str, Stored]


@dataclass
class Repo:
    private: bool
    commits: list[Commit] = field(default_factory=list)

    @property
    def files(self) -> dict[str, Stored]:
        return self.commits[-1].files

    def add_commit(self, summary: str, add: dict[str, Stored], delete: list[str]) -> Commit:
        files = {} if not self.commits else {p: f for p, f in self.files.items() if p not in delete}
        files.update(add)
        oid = hashlib.sha1(f"{len(self.commits)} {summary}".encode()).hexdigest()
        self.commits.append(Commit(oid, summary, sorted(add), sorted(delete), files))
        return self.commits[-1]


@dataclass
class Failure:
    """What happens to matching requests, ``times`` times: a status, a cut connection, or silence."""

    method: str
    path: re.Pattern[str]
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1
    cut: str | None = None  # "before" the request is handled, "after" it was, or "body" in the middle of the answer
    hang: bool = False
    slow: float = 0.0


class Answer(Exception):
    def __init__(self, status: int, message: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
