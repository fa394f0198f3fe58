"""The control round: what each rank knows by itself becomes known to all, before anything is done about it.

Whether a step is made, and of what, whether to wait, to save or to end, follows from these facts alone. Time is that of
rank 0. A round goes over a way of its own, so that ranks that wait occupy no device.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gradient_selectors.world.base import World, gathered

from stream_trainer import errors
from stream_trainer.errors import StreamTrainerError


@dataclass(frozen=True)
class Fact:
    """What one rank knows.

    Attributes:
        time: `time.monotonic()`.
        stopping: whether it was told to stop.
        counts: records by outcome that no other rank knows of.
        orders: what was ordered there and is to be obeyed, in order.
        ready: partitions of the samples that wait there, in order, as many as may be taken.
        more: whether further samples may come soon, beyond those of `ready`.
        ended: whether none will ever come.
        full: whether its buffer takes no more.
        failure: kind and words of what its stream failed with.
        written: whether all it was writing of a checkpoint is durable, or failed.
    """

    time: float
    stopping: bool
    counts: Mapping[str, int] = field(default_factory=dict)
    orders: Sequence[str] = ()
    ready: Sequence[int] = ()
    more: bool = True
    ended: bool = False
    full: bool = False
    failure: tuple[str, str] | None = None
    written: bool = False


@dataclass
class Control:
    """What all ranks have agreed on.

    Attributes:
        told_to_stop: whether this rank was.
        stopping: whether any rank was told to stop, as of the last round.
        elsewhere: records by outcome that other ranks alone know of.
        ordered: what rank 0 is ordered to do, as of the last round.
        written: whether what the ranks were writing of a checkpoint is durable, or failed, as of the last round.
    """

    world: World
    told_to_stop: Callable[[], bool]
    own_counts: Callable[[], Mapping[str, int]] = dict
    own_orders: Callable[[], Sequence[str]] = tuple
    own_written: Callable[[], bool] = bool
    stopping: bool = field(default=False, init=False)
    elsewhere: dict[str, int] = field(default_factory=dict, init=False)
    ordered: Sequence[str] = field(default=(), init=False)
    written: bool = field(default=False, init=False)
    _now: float = field(default=0.0, init=False)

    def round(self, **known: Any) -> list[Fact]:
        """Tell the others what this rank knows. Returns what each knows."""
        own = Fact(
            time.monotonic(),
            self.told_to_stop(),
            self.own_counts(),
            self.own_orders(),
            **known,
            written=self.own_written(),
        )
        facts = [Fact(**fact) for fact in gathered(self.world, asdict(own))]
        self._now, self.ordered, self.written = facts[0].time, facts[0].orders, all(fact.written for fact in facts)
        self.stopping = self.stopping or any(fact.stopping for fact in facts)
        others = [fact.counts for rank, fact in enumerate(facts) if rank != self.world.rank]
        self.elsewhere = {name: sum(counts[name] for counts in others) for name in own.counts}
        return facts

    def is_stopping(self) -> bool:
        """Whether any rank was told to stop, as of the last round: the same answer everywhere."""
        return self.stopping

    def now(self) -> float:
        """Rank 0's `time.monotonic()` at the last round."""
        if not self._now:
            self.round()
        return self._now

    def any(self, fact: bool) -> bool:
        """Whether it is so on any rank."""
        return any(found for (found,) in self.world.facts([fact]))


def told(error: BaseException) -> tuple[str, str]:
    """An error in words that another rank understands."""
    return type(error).__name__, str(error)


def failure_of(work: Callable[[], object]) -> tuple[str, str] | None:
    """What work fails with, in such words; None if it does not."""
    try:
        work()
    except StreamTrainerError as error:
        return told(error)
    return None


def understood(kind: str, words: str) -> StreamTrainerError:
    """The error that was told; of a kind that the exit code of the run follows from."""
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, StreamTrainerError):
        return found(words)
    return StreamTrainerError(words)


def agree_on(world: World, failure: tuple[str, str] | None) -> None:
    """Raise on every rank what any failed with, if one did."""
    for found in gathered(world, failure):
        if found is not None:
            raise understood(*found)


def by_first(world: World, work: Callable[[], None]) -> None:
    """Have rank 0 do something that only one may do. Raises on every rank what it fails with there."""
    if world.size == 1:
        work()
        return
    agree_on(world, failure_of(work) if world.rank == 0 else None)
