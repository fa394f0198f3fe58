"""Where the time of a thread goes: every moment of it under one name, so that the names sum to wall time."""

import time
from collections.abc import Callable

from stream_trainer.monitoring.metrics import Metrics


class Laps:
    """Charges the time since the last lap to what was done in it. Used by the thread that reads."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.perf_counter) -> None:
        self._counter, self._clock = metrics.reading_seconds, clock
        self._last = clock()

    def lap(self, name: str) -> None:
        """All since the last lap was for `name`."""
        now = self._clock()
        self._counter.labels(name).inc(now - self._last)
        self._last = now


class Rest:
    """Finds the time that no phase was charged with, and charges `other` with it. Used by the main thread."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.perf_counter) -> None:
        self._phases, self._clock = metrics.phase_seconds, clock
        self._last, self._spent = clock(), self._sum()

    def note(self) -> None:
        """To be called where no phase is under way."""
        now, spent = self._clock(), self._sum()
        other = max(0.0, now - self._last - (spent - self._spent))
        self._phases.inc(other, "other")
        self._last, self._spent = now, spent + other

    def _sum(self) -> float:
        return sum(self._phases.by_labels.values())
