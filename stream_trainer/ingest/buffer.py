"""What waits between the ingest thread and the trainer: a queue of samples, bounded in records, bytes and tokens."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from stream_trainer.records import Sample
from stream_trainer.settings.schema import BufferSettings

STOP_CHECK_S = 0.1  # a stop is noticed within this time


class Buffer:
    """Thread-safe, first in, first out. The limits are advice to the one who puts: `put` never blocks or drops.

    Attributes:
        taken: samples that were ever taken; `last_taken` is the newest of them.
    """

    def __init__(self, settings: BufferSettings) -> None:
        self._settings = settings
        self._changed = threading.Condition()
        self._samples: deque[Sample] = deque()
        self._bytes = 0
        self._tokens = 0
        self._ended = False
        self._error: BaseException | None = None
        self._ended_by: BaseException | None = None
        self._starved = False
        self._planned: int | None = None
        self.taken = 0
        self.last_taken: Sample | None = None

    def put(self, *samples: Sample) -> None:
        """Append samples, in this order. A taker is woken once for all of them."""
        with self._changed:
            assert not self._ended, "the stream has ended"
            self._samples.extend(samples)
            self._bytes += sum(sample.size for sample in samples)
            self._tokens += sum(sample.num_tokens for sample in samples)
            self._changed.notify()

    def take(self, n: int, wait_s: float, stopped: Callable[[], bool], *, or_none: bool = False) -> list[Sample]:
        """The oldest `n` samples.

        Fewer only if the stream has ended, if fewer reach a limit of the buffer, or if `wait_s` seconds have passed
        since there was one to take. Empty only if `stopped()` turned true, or the stream has ended and all is taken.
        With `or_none` the taker can do without: the wait begins at once, and what came by its end is enough, even
        nothing. Raises what `fail` was given, and what `end` was given once all is taken that came before.
        """
        taken = self._take(n, wait_s, stopped, or_none) if self._planned is None else self._take_planned(stopped)
        self.taken += len(taken)
        self.last_taken = taken[-1] if taken else self.last_taken
        return taken

    def plan(self, n: int | None) -> None:
        """Have the next `take` return `n` samples, however long that takes, or fewer if the stream ends; None ends it.

        As many as were taken once before, when they came at other times: limits say nothing then.
        """
        self._planned = n

    def _take(self, n: int, wait_s: float, stopped: Callable[[], bool], or_none: bool) -> list[Sample]:
        with self._changed:
            deadline = time.monotonic() + wait_s if or_none else None
            while not stopped():
                if self._error is not None:
                    raise self._error
                if self._ended_by is not None and not self._samples and not or_none:
                    raise self._ended_by
                now = time.monotonic()
                if deadline is None and self._samples:
                    deadline = now + wait_s
                if len(self._samples) >= n or self._ended or self._is_full() or (deadline and now >= deadline):
                    return self._pop(n)
                self._starved = True
                self._changed.wait(STOP_CHECK_S if deadline is None else min(STOP_CHECK_S, deadline - now))
            return []

    def _take_planned(self, stopped: Callable[[], bool]) -> list[Sample]:
        taken: list[Sample] = []
        with self._changed:
            while not stopped():
                if self._error is not None:
                    raise self._error
                while self._samples and len(taken) < (self._planned or 0):
                    taken += self._pop(1)
                if self._ended_by is not None and self._planned and not taken:
                    raise self._ended_by
                if len(taken) == self._planned or self._ended:
                    return taken
                self._starved = True
                self._changed.wait(STOP_CHECK_S)
            self._put_back(taken)
            return []

    def _put_back(self, samples: Sequence[Sample]) -> None:
        self._samples.extendleft(reversed(samples))
        self._bytes += sum(sample.size for sample in samples)
        self._tokens += sum(sample.num_tokens for sample in samples)

    def _pop(self, n: int) -> list[Sample]:
        """Up to `n` samples, and no more than reach a limit: how many came by now must not change what a step gets."""
        self._starved = False
        taken: list[Sample] = []
        size = tokens = 0
        while self._samples and len(taken) < n and not self._exceeds(len(taken), size, tokens):
            taken.append(self._samples.popleft())
            size += taken[-1].size
            tokens += taken[-1].num_tokens
        self._bytes -= size
        self._tokens -= tokens
        return taken

    def end(self, error: BaseException | None = None) -> None:
        """Note that no sample will follow, because of `error` if one is given: `take` then ends in it."""
        with self._changed:
            self._ended, self._ended_by = True, error
            self._changed.notify()

    def fail(self, error: BaseException) -> None:
        """Make `take` raise `error`, now and from then on."""
        with self._changed:
            self._error = error
            self._changed.notify()

    def _is_full(self) -> bool:
        return self._exceeds(len(self._samples), self._bytes, self._tokens)

    def _exceeds(self, records: int, size: int, tokens: int) -> bool:
        limits = self._settings
        return records >= limits.max_records or size >= limits.max_bytes or tokens >= limits.max_tokens

    @property
    def full(self) -> bool:
        """Whether any limit is reached: stop reading."""
        with self._changed:
            return self._is_full()

    @property
    def low(self) -> bool:
        """Whether to go on reading: less than half of every limit is used, or a taker waits for more than there is."""
        with self._changed:
            limits = self._settings
            return not self._is_full() and (
                self._starved
                or (
                    2 * len(self._samples) < limits.max_records
                    and 2 * self._bytes < limits.max_bytes
                    and 2 * self._tokens < limits.max_tokens
                )
            )

    @property
    def ended(self) -> bool:
        """Whether `end` was called."""
        return self._ended

    @property
    def records(self) -> int:
        """Samples that wait."""
        return len(self._samples)

    @property
    def bytes(self) -> int:
        """Bytes of their records' values."""
        return self._bytes

    @property
    def tokens(self) -> int:
        """Their tokens."""
        return self._tokens
