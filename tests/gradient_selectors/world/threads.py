"""Ranks as threads of one process, which meet at a barrier in every call."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import pytest
import torch
from gradient_selectors.world.base import LostError
from gradient_selectors.world.deal import own_span
from torch import Tensor

T = TypeVar("T")
PATIENCE_S = 60.0


@dataclass
class Meeting:
    """Where the threads of a world meet."""

    size: int
    slots: list[Any] = field(init=False)
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.slots, self.barrier = [None] * self.size, threading.Barrier(self.size, timeout=PATIENCE_S)


class ThreadWorld:
    """One rank. Asserts that all make the same call; `calls` lists them."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.size, self._meeting = rank, meeting.size, meeting
        self.sent, self.calls = Counter[str](), list[tuple[Any, ...]]()

    def sum(self, values: Tensor) -> Tensor:
        self.sent["sum"] += 2 * values.nbytes * (self.size - 1) // self.size
        found = self._meet(("sum", tuple(values.shape), values.dtype), values.clone())
        values.copy_(torch.stack(found).sum(0))
        return values

    def rows(self, local: Tensor, counts: Sequence[int]) -> Tensor:
        assert len(local) == counts[self.rank]
        self.sent["rows"] += local.nbytes * (self.size - 1)
        return torch.cat(self._meet(("rows", tuple(counts), local.dtype), local.clone()))

    def exchange(self, parts: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        self.sent["exchange"] += sum(part.nbytes for r, part in enumerate(parts) if r != self.rank)
        found = self._meet(("exchange", parts[0].dtype), [part.clone() for part in parts])
        mine = [parts[self.rank].flatten() for parts in found]
        assert [len(part) for part in mine] == list(counts)
        return mine

    def scatter(self, values: Tensor) -> Tensor:
        lo, hi = own_span(self, len(values))
        self.sent["scatter"] += values.nbytes * (self.size - 1) // self.size
        return torch.stack(self._meet(("scatter", tuple(values.shape)), values.clone())).sum(0)[lo:hi]

    def gather(self, value: bytes) -> list[bytes]:
        self.sent["control"] += len(value) * (self.size - 1)
        return self._meet(("gather",), value)

    def facts(self, numbers: Sequence[int]) -> list[list[int]]:
        self.sent["control"] += 8 * len(numbers) * (self.size - 1)
        return self._meet(("facts", len(numbers)), [int(n) for n in numbers])

    def _meet(self, call: tuple[Any, ...], value: T) -> list[T]:
        self.calls.append(call)
        meeting = self._meeting
        try:
            meeting.slots[self.rank] = call, value
            meeting.barrier.wait()
            found = list(meeting.slots)
            meeting.barrier.wait()
        except threading.BrokenBarrierError:
            raise LostError("another rank has ended") from None
        assert all(other == call for other, _ in found), [other for other, _ in found]
        return [value for _, value in found]


def on_ranks(size: int, work: Callable[[ThreadWorld], T]) -> list[T]:
    """What `work` returns on each rank. Raises what it raises on the first that fails."""
    meeting = Meeting(size)
    results: list[Any] = [None] * size
    errors: dict[int, BaseException] = {}

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadWorld(rank, meeting))
        except BaseException as error:
            errors[rank] = error
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    own = [error for _, error in sorted(errors.items()) if not isinstance(error, LostError)]
    for error in [*own, *errors.values()]:
        raise error
    return results


def without_locks(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Python 3.12 a cached property locks all instances: threads that meet inside one would never meet."""
    for found in vars(kind).values():
        if isinstance(found, cached_property) and hasattr(found, "lock"):
            monkeypatch.setattr(found, "lock", nullcontext())
