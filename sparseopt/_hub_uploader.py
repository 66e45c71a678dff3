"""Uploads beside training: entries on disk (:mod:`sparseopt._hub_spool`), sent in order by a thread.

Training only ever waits for a hard link and a small file. The thread is a daemon and every attempt has a thread of its
own, which is left behind when the server hangs: nothing of this holds up a step, or the end of the process.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sparseopt import _hub_spool as spools
from sparseopt._hub_card import describe_step
from sparseopt._hub_errors import Problem, explain, hub_failures
from sparseopt._hub_places import open_repository
from sparseopt._hub_send import LONGEST_BACKOFF, prepare, send, with_retries

__all__ = ["Uploader", "pending", "push_pending"]

logger = logging.getLogger("sparseopt.hub")

SLOWEST = 256 << 10  # bytes/s: an attempt that is slower than this (after attempt_timeout) counts as hung


@dataclass
class _Upload:
    """An entry on its way; ``source`` is the opened mask file while it is still to be copied."""

    entry: spools.Entry
    spooled: threading.Event = field(default_factory=threading.Event)
    failed: bool = False  # it could not be copied: there is nothing to send
    retry: bool = False  # it was given up, but another attempt can succeed


class Uploader:
    """Uploads masks in the background; never raises once made, and never blocks training.

    Args:
        repo_id: repository or folder (see :mod:`sparseopt.hub`).
        private: for a new repository.
        spool_dir: folder where uploads wait; what an earlier run of the same repository left there is sent first.
        base_model: model that the masks are for.
        token: access token (default: the one logged in with); it is never written to disk.
        retries: further attempts for one upload after failures that can pass. What is given up stays in the folder, and
            is tried again after the next upload that succeeds.
        backoff: seconds before the first of them, doubled each time up to five minutes, with jitter; a server's
            Retry-After counts for more.
        attempt_timeout: seconds that an attempt may take (and 4 s more per MiB) before it counts as hung.
        say: takes the lines that tell of uploads, from another thread (default: the logger ``sparseopt.hub``, level INFO).

    Only rank 0 uploads (torch.distributed, else the environment's RANK or LOCAL_RANK); elsewhere nothing happens.

    Raises:
        ValueError: the name is neither a repository nor a folder.
    """

    def __init__(
        self,
        repo_id: str | os.PathLike[str],
        *,
        private: bool = True,
        spool_dir: str | os.PathLike[str],
        base_model: str | None = None,
        token: str | bool | None = None,
        retries: int = 5,
        backoff: float = 2.0,
        attempt_timeout: float = 600.0,
        say: Callable[[str], object] | None = None,
    ) -> None:
        self.repo_id = os.fspath(repo_id)
        self.spool_dir = Path(spool_dir)
        self._repository = open_repository(repo_id, token=token)
        self._private, self._base_model = private, base_model
        self._retries, self._backoff, self._attempt_timeout = retries, backoff, attempt_timeout
        self._say = say or logger.info
        self._queue: deque[_Upload] = deque()
        self._given_up: list[_Upload] = []
        self._current: _Upload | None = None
        self._change = threading.Condition()
        self._closed = self._hurry = self._prepared = self._no_space = False
        self._thread: threading.Thread | None = None
        self._lock: contextlib.ExitStack | None = None
        if is_first_rank():
            self._adopt()

    # ---- called by training ------------------------------------------------------------------------------------------
    def submit(self, step: int, mask_file: str | os.PathLike[str], metadata: Mapping[str, Any]) -> None:
        """Hands over the masks of a step and returns at once.

        The file may be deleted or replaced (not overwritten in place) right after. Failures are logged as warnings.

        Args:
            step: training step.
            mask_file: ``.safetensors`` or ``.pt``.
            metadata: what is known about the masks; the schema's missing keys become null.
        """
        if not is_first_rank():
            return
        if self._closed:
            logger.warning("Masks of step %s are not uploaded: the uploader was closed.", step)
            return
        try:
            described = describe_step(step, metadata, self._base_model)
            entry, source = spools.make_entry(
                self.spool_dir, self.repo_id, step, self._private, Path(mask_file), described
            )
        except spools.NoSpaceError as error:
            if not self._no_space:
                logger.warning("Masks of step %s are not uploaded, nor later ones until there is room: %s", step, error)
            self._no_space = True
            return
        except (OSError, TypeError, ValueError) as error:
            logger.warning("Masks of step %s are not uploaded: %s", step, error)
            return
        self._no_space = False
        upload = _Upload(entry)
        if source is None:
            upload.spooled.set()
        else:
            # Another file system: copying may take long, and must not wait for an upload that hangs.
            threading.Thread(target=_copy, args=(upload, source), name="sparseopt-spool", daemon=True).start()
        self._put(upload)

    def flush(self, timeout: float) -> list[int]:
        """Waits until everything is uploaded or given up, at most ``timeout`` seconds.

        Returns:
            Steps that are left (a warning says where, and how to upload them); [] = all is uploaded.
        """
        deadline = time.monotonic() + timeout
        with self._change:
            self._hurry = True  # what waits for its next attempt makes it now
            again = [upload for upload in self._given_up if upload.retry and not self._closed]
            self._given_up = [upload for upload in self._given_up if upload not in again]
            self._queue.extend(again)
            self._change.notify_all()
            while (self._queue or self._current) and not self._closed and (rest := deadline - time.monotonic()) > 0:
                self._change.wait(rest)
            self._hurry = False
            current = [self._current] if self._current else []
            left = sorted(upload.entry.step for upload in (*current, *self._queue, *self._given_up))
        if left:
            logger.warning(
                "Not uploaded to %s: step%s %s. They wait in %s; upload them with: sparseopt masks push --pending %s",
                self._repository.name, "" if len(left) == 1 else "s", ", ".join(map(str, left)), self.spool_dir,
                self.spool_dir,
            )  # fmt: skip
        return left

    def close(self) -> None:
        """Takes and sends nothing more; returns at once, and what is left stays on disk."""
        with self._change:
            self._closed = True
            self._change.notify_all()
            if self._thread is None and self._lock is not None:
                self._lock.close()

    # ---- the thread --------------------------------------------------------------------------------------------------
    def _put(self, *uploads: _Upload) -> None:
        with self._change:
            self._queue.extend(uploads)
            if uploads and self._thread is None:
                self._thread = threading.Thread(target=self._work, name="sparseopt-upload", daemon=True)
                self._thread.start()
            self._change.notify_all()

    def _adopt(self) -> None:
        """Takes over what an earlier run left, unless another process works on the folder."""
        try:
            self.spool_dir.mkdir(parents=True, exist_ok=True)
            self._lock = _try_lock(self.spool_dir)
            entries, damaged = spools.read_entries(self.spool_dir) if self._lock is not None else ([], [])
        except OSError as error:
            logger.warning("Earlier uploads are not looked for: %s", error)
            return
        for problem in damaged:
            logger.warning("An earlier upload is left out: %s", problem)
        mine = [_Upload(entry) for entry in entries if entry.repo_id == self.repo_id]
        for upload in mine:
            upload.spooled.set()
        self._put(*mine)

    def _work(self) -> None:
        while True:
            with self._change:
                while not self._queue and not self._closed:
                    self._change.wait()
                if self._closed:
                    break
                upload = self._current = self._queue.popleft()
            upload.spooled.wait()
            done = upload.failed or self._upload(upload)
            with self._change:
                self._current = None
                if done and self._given_up and not self._closed:
                    self._queue.extend(self._given_up)  # the way is open again
                    self._given_up.clear()
                self._change.notify_all()
        if self._lock is not None:
            self._lock.close()

    def _upload(self, upload: _Upload) -> bool:
        """Sends one entry; True when it arrived."""
        step = upload.entry.step
        problem: Problem | None = None
        for attempt in range(self._retries + 1):
            problem = self._attempt(upload.entry)
            if problem is None:
                spools.remove_entry(upload.entry)
                return True
            if self._closed:
                break
            if not problem.retry:
                logger.warning("Masks of step %d are not uploaded: %s They stay in %s.", step, problem.sentence,
                               upload.entry.folder)  # fmt: skip
                break
            if attempt == self._retries:
                logger.warning("Masks of step %d are not uploaded after %d attempts: %s They stay in %s.", step,
                               attempt + 1, problem.sentence, upload.entry.folder)  # fmt: skip
                break
            wait = min(self._backoff * 2**attempt, LONGEST_BACKOFF) * random.uniform(1.0, 1.25)
            wait = max(wait, problem.wait or 0.0)
            logger.warning("Masks of step %d: %s Attempt %d follows in %.1f s.", step, problem.sentence, attempt + 2,
                           wait)  # fmt: skip
            self._pause(wait, may_hurry=problem.wait is None)
        with self._change:
            upload.retry = problem is not None and problem.retry
            self._given_up.append(upload)
        return False

    def _pause(self, seconds: float, may_hurry: bool) -> None:
        deadline = time.monotonic() + seconds
        with self._change:
            while not self._closed and (rest := deadline - time.monotonic()) > 0:
                if may_hurry and self._hurry:
                    self._hurry = False  # once for each flush
                    return
                self._change.wait(rest)

    def _attempt(self, entry: spools.Entry) -> Problem | None:
        """One attempt, in a thread of its own: the client waits for ever for a server that hangs."""
        outcome: list[Problem | None] = []

        def run() -> None:
            try:
                if not self._prepared:
                    prepare(self._repository, self._private)
                    self._prepared = True
                send(self._repository, entry.file, entry.step, entry.metadata, self._say)
                outcome.append(None)
            except hub_failures() as error:
                outcome.append(explain(error, self._repository.name))

        thread = threading.Thread(target=run, name="sparseopt-attempt", daemon=True)
        deadline = time.monotonic() + self._attempt_timeout + entry.bytes / SLOWEST
        with _no_bars():
            thread.start()
            while thread.is_alive() and not self._closed and (rest := deadline - time.monotonic()) > 0:
                thread.join(min(rest, 0.2))
        if outcome:
            if outcome[0] is not None and outcome[0].kind is FileNotFoundError:
                self._prepared = False  # the repository is gone: make it again next time
            return outcome[0]
        what = "did not answer in time" if thread.is_alive() else "could not be understood"
        return Problem(f"the Hub {what} for {self._repository.name!r}.", ConnectionError, retry=True)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Keeps the client's bars out of the training's output, unless HF_HUB_DISABLE_PROGRESS_BARS=0 asks for them."""
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled() or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _copy(upload: _Upload, source: Any) -> None:
    try:
        spools.finish(upload.entry, source)
    except OSError as error:
        upload.failed = True
        logger.warning("Masks of step %d are not uploaded: %s", upload.entry.step, error)
    finally:
        upload.spooled.set()


def pending(spool_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Uploads that wait in a folder: ``{repo_id, step, bytes, private}`` each, by repository and step.

    Raises:
        FileNotFoundError: there is no such folder.
        sparseopt.FormatError: there are only damaged entries.
    """
    entries, damaged = spools.read_entries(Path(spool_dir))
    if damaged and not entries:
        raise damaged[0]
    return [
        {"repo_id": entry.repo_id, "step": entry.step, "bytes": entry.bytes, "private": entry.private}
        for entry in entries
    ]


def push_pending(
    spool_dir: str | os.PathLike[str], *, token: str | bool | None = None, retries: int = 3, backoff: float = 1.0
) -> list[dict[str, Any]]:
    """Uploads what a killed or offline run left in its folder; an entry goes when it has arrived.

    Args:
        spool_dir: the run's spool folder.
        token, retries, backoff: see :func:`sparseopt.hub.push_masks`.

    Returns:
        ``{repo_id, step, bytes}`` of what was uploaded.

    Raises:
        FileNotFoundError: there is no such folder.
        sparseopt.FormatError: an entry is damaged; the others were uploaded.
        ValueError: a run that still works uploads from this folder.
        PermissionError, ConnectionError, ...: an upload failed; it and those after it stay.
    """
    from sparseopt.progress import Progress

    folder = Path(spool_dir)
    entries, damaged = spools.read_entries(folder)
    lock = _try_lock(folder)
    if lock is None:
        raise ValueError(f"'{folder}' is in use: a running process uploads from it.")
    sent = []
    with lock, Progress("upload", total=len(entries)) as progress:
        for (repo_id, private), group in itertools.groupby(entries, key=lambda entry: (entry.repo_id, entry.private)):
            repository = open_repository(repo_id, token=token)
            with_retries(partial(prepare, repository, private), repo_id, retries, backoff)
            for entry in group:
                call = partial(send, repository, entry.file, entry.step, entry.metadata)
                with_retries(call, repo_id, retries, backoff)
                spools.remove_entry(entry)
                sent.append({"repo_id": repo_id, "step": entry.step, "bytes": entry.bytes})
                progress.update(step=entry.step)
    if damaged:
        raise damaged[0]
    return sent


def _try_lock(folder: Path) -> contextlib.ExitStack | None:
    """The folder's lock, held until it is closed; None while another process holds it."""
    from filelock import FileLock, Timeout

    held = contextlib.ExitStack()
    lock = FileLock(folder / spools.LOCK, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    except NotImplementedError:  # a file system without locks: at worst something is sent twice, which changes nothing
        return held
    held.callback(lock.release)
    return held


def is_first_rank() -> bool:
    """Whether this process is rank 0 of its job, or alone."""
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            return dist.get_rank() == 0
    return (os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0").strip() == "0"
