"""The buffer of a rank, from which all ranks take together: every rank gets the same samples, whoever read them."""

from collections.abc import Callable
from dataclasses import dataclass, field

from stream_trainer.distributed.control import Control, Fact, told, understood
from stream_trainer.distributed.samples import from_bytes, to_bytes
from stream_trainer.distributed.turns import take_turns
from stream_trainer.ingest.buffer import STOP_CHECK_S, Buffer
from stream_trainer.records import Partition, Sample
from stream_trainer.settings.schema import BufferSettings


@dataclass
class _Waiting:
    """Since when there is a sample to take."""

    wait_s: float
    deadline: float | None = field(default=None)

    def is_over(self, now: float, *, begins: bool) -> bool:
        if self.deadline is None and begins:
            self.deadline = now + self.wait_s
        return self.deadline is not None and now >= self.deadline


class SharedBuffer(Buffer):
    """What this rank has read, and the way to what the others have.

    `take` is a call of all ranks: what it waits for, and when it returns, follows from what all know. The ingest thread
    puts in what it reads, as into any buffer.
    """

    def __init__(self, settings: BufferSettings, control: Control) -> None:
        super().__init__(settings)
        self._control = control
        self._last = -1  # partition of the sample that was taken last
        self._idle: Callable[[], bool] = lambda: False

    def begin(self, last: Partition | None, idle: Callable[[], bool]) -> None:
        """Go on with the partition after this one; `idle` is asked of the ingest thread."""
        self._last, self._idle = -1 if last is None else last.number, idle

    def take(self, n: int, wait_s: float, stopped: Callable[[], bool], *, or_none: bool = False) -> list[Sample]:
        """As `Buffer.take`, from all ranks: the same samples on each. Raises what any rank's stream failed with."""
        waiting = _Waiting(wait_s)
        while not stopped():
            facts = self._control.round(**self._known(n))
            self._raise_failure(facts)
            if self._control.stopping:
                continue  # `stopped` says so now
            late = waiting.is_over(self._control.now(), begins=or_none or any(fact.ready for fact in facts))
            late = late or any(fact.full for fact in facts)
            order = take_turns([f.ready for f in facts], [f.more and not late for f in facts], self._last, n)
            ended = all(fact.ended for fact in facts)
            enough = len(order) == n or late or ended
            if enough and (order or or_none or ended):
                return self._take_in(order)
            self._wait_for_more()
        return []

    def _known(self, n: int) -> dict[str, object]:
        idle = self._idle()  # before what is here is looked at: what came since is here
        with self._changed:
            error = self._error
            if error is None and self._ended_by is not None and not self._samples:
                error = self._ended_by
            ready = [sample.partition.number for _, sample in zip(range(n), self._samples, strict=False)]
            more = not (self._ended or idle) and len(ready) < n
            failure = None if error is None else told(error)
            return {
                "ready": ready,
                "more": more,
                "ended": self._ended,
                "full": self._is_full(),
                "failure": failure,
            }

    def _raise_failure(self, facts: list[Fact]) -> None:
        for rank, fact in enumerate(facts):
            if fact.failure is not None:
                kind, words = fact.failure
                own = self._error or self._ended_by
                if own is not None and rank == self._control.world.rank:
                    raise own
                raise understood(kind, f"rank {rank}: {words}")

    def _take_in(self, order: list[int]) -> list[Sample]:
        """What the ranks of `order` give, in this order."""
        world = self._control.world
        with self._changed:
            own = [sample for _ in range(order.count(world.rank)) for sample in self._pop(1)]
        came = [iter(from_bytes(data)) for data in world.gather(to_bytes(own))]
        came[world.rank] = iter(own)
        taken = [next(came[rank]) for rank in order]
        self.taken += len(taken)
        if taken:
            self.last_taken, self._last = taken[-1], taken[-1].partition.number
        return taken

    def _wait_for_more(self) -> None:
        with self._changed:
            self._starved = True
            self._changed.wait(STOP_CHECK_S)
