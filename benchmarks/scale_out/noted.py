"""A world that notes what its calls take: the bytes that are counted are those of the calls themselves."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from gradient_selectors.world.base import World
from torch import Tensor


class Noted:
    """Ranks, each of whose calls is timed while `times` is set.

    Attributes:
        seconds: by kind of call, with the wait for the others.
        sent: bytes by kind of call, as the ranks count them.
    """

    def __init__(self, inner: World, wait: Callable[[], None]) -> None:
        """`wait`: until the device is done, so that a call's seconds are its own."""
        self.rank, self.size, self.sent = inner.rank, inner.size, inner.sent
        self.seconds: dict[str, float] = {}
        self.times = False
        self._inner, self._wait = inner, wait

    def sum(self, values: Tensor) -> Tensor:
        with self._timing("sum"):
            return self._inner.sum(values)

    def rows(self, local: Tensor, counts: Sequence[int]) -> Tensor:
        with self._timing("rows"):
            return self._inner.rows(local, counts)

    def exchange(self, parts: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        with self._timing("exchange"):
            return self._inner.exchange(parts, counts)

    def scatter(self, values: Tensor) -> Tensor:
        with self._timing("scatter"):
            return self._inner.scatter(values)

    def gather(self, value: bytes) -> list[bytes]:
        with self._timing("control"):
            return self._inner.gather(value)

    def facts(self, numbers: Sequence[int]) -> list[list[int]]:
        with self._timing("control"):
            return self._inner.facts(numbers)

    @contextmanager
    def _timing(self, kind: str) -> Iterator[None]:
        if not self.times:
            yield
            return
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - started
