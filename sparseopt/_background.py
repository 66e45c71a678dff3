"""One task at a time in a thread of its own: what is written while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

__all__ = ["Background"]


class Background:
    """Runs tasks in the order in which they come, beside the caller, who waits where one is still running.

    What a task raises is raised by the next call here, once; tasks after it can go on. A process that ends waits for the
    task that is running.
    """

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._running: Future[Any] | None = None

    def submit(self, task: Callable[..., Any], *arguments: Any) -> None:
        """Waits for the task before, raises its error (the new one is not run then), and begins ``task(*arguments)``."""
        self.flush()
        self._running = self._thread.submit(task, *arguments)

    def flush(self) -> None:
        """Waits for the task on its way; raises its error, once."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    @property
    def pending(self) -> bool:
        """Whether a task is on its way."""
        return self._running is not None and not self._running.done()

    def close(self) -> None:
        """As :meth:`flush`, for good."""
        try:
            self.flush()
        finally:
            self._thread.shutdown()
