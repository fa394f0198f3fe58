"""A thread that works on the newest of what it is given: what waits is replaced, and nobody waits for it."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

logger = logging.getLogger(__name__)


class Job(Protocol):
    """Something to work on that holds on to something."""

    def close(self) -> None:
        """Called once, after the work or instead of it."""


T = TypeVar("T", bound=Job)


class Newest(Generic[T]):
    """One thread, one job at work and at most one that waits."""

    def __init__(self, name: str, work: Callable[[T], None]) -> None:
        """`work` reports its own failures; what it raises beside them is logged, and the thread goes on."""
        self._work = work
        self._condition = threading.Condition()
        self._waiting: T | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def offer(self, job: T) -> None:
        """Take the place of the job that waits."""
        with self._condition:
            replaced, self._waiting = self._waiting, job
            self._condition.notify_all()
        if replaced is not None:
            replaced.close()

    def close(self, timeout_s: float, drop: bool = False) -> bool:
        """End the thread after what there is, or with `drop` after what is at work; whether that came in time."""
        deadline = time.monotonic() + timeout_s
        with self._condition:
            dropped = self._waiting if drop else None
            self._waiting = None if drop else self._waiting
            self._closed = True
            self._condition.notify_all()
        if dropped is not None:
            dropped.close()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._closed or self._waiting is not None)
                job, self._waiting = self._waiting, None
                if job is None:
                    return
            try:
                self._work(job)
            except Exception:
                logger.exception("%s failed", self._thread.name)
            finally:
                job.close()
