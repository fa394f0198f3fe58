"""Write down what each step is made of before it is made, and make it of the same again where that is known already.

What an earlier process planned behind its last checkpoint is followed: records come in the order in which they came,
however fast they come now, and each step takes as many. Where that is not possible any more, a line in the log says so,
and the run goes on with what comes. `replay` makes the steps between two checkpoints again in the same way.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from stream_trainer.checkpoints.plan import Entry, Made, PlanFile, Planned, Position
from stream_trainer.errors import NotAsPlannedError
from stream_trainer.ingest.buffer import Buffer
from stream_trainer.ingest.cursor import Cursor
from stream_trainer.records import Partition, Sample
from stream_trainer.training.draw.pools import PoolSampler
from stream_trainer.training.faults.culprits import KILLED, Failure
from stream_trainer.training.step import StepReport

GONE = "the records that it was made of are not there any more"

logger = logging.getLogger(__name__)


@dataclass
class Plan:
    """The plan of one run.

    Attributes:
        strict: raise NotAsPlannedError where a step cannot be made as planned: of a run that only makes steps again.
    """

    file: PlanFile
    cursor: Cursor
    buffer: Buffer
    strict: bool = False
    _entries: dict[int, Entry] = field(default_factory=dict, init=False)  # those that are followed
    _accused: list[tuple[int, int, str]] = field(default_factory=list, init=False)
    _last: Sample | None = field(default=None, init=False)

    def begin(self, step: int, *, follow: bool) -> None:
        """Go on behind the checkpoint of a step. To be called before anything is read.

        Without `follow`, what was planned behind it is cut off: steps would not be the same. Raises FencedError.
        """
        found = self.file.begin(step, follow=follow)
        if found and not follow:
            logger.info("what was planned for steps %d to %d is not followed: it is another run", step + 1, max(found))
        self._entries = found if follow else {}
        if self._entries:
            logger.info("steps %d to %d are made as they were planned", step + 1, max(self._entries))
            entries = self._entries.values()
            records = [(Partition(e.planned.topic, p), at) for e in entries for p, at in e.planned.records]
            self.cursor.follow(records)

    def next(self, sampler: PoolSampler, step: int, saved: int | None, stopped: Callable[[], bool]) -> list[Sample]:
        """The pool of a step, which is written down before it is returned. Empty as `sampler.next` is."""
        pool, candidates = self._draw(sampler, step, stopped)
        if not pool:
            return []
        line = self._planned(step, saved, pool, candidates)
        entry = self._entries.get(step)
        if entry is not None:
            if why := _difference(entry.planned, line):
                self._leave(step, why, gone=why == GONE)
            else:
                line = entry.planned  # which names records also that this process did not have to read again
        self._accused = []
        self.file.append(line)
        return pool

    def _draw(self, sampler: PoolSampler, step: int, stopped: Callable[[], bool]) -> tuple[list[Sample], int]:
        """What the sampler draws, and from how many."""
        entry = self._entries.get(step)
        waiting, taken = sampler.waiting, self.buffer.taken
        if entry is None:
            pool = sampler.next(stopped)
        else:
            self.buffer.plan(max(0, entry.planned.candidates - waiting))
            pool = sampler.next(lambda: bool(self.cursor.plan_broken) or stopped())
            self.buffer.plan(None)
            if not pool and self.cursor.plan_broken:
                self._leave(step, self.cursor.plan_broken, gone=True)
                return self._draw(sampler, step, stopped)
        return pool, waiting + self.buffer.taken - taken

    def _planned(self, step: int, saved: int | None, pool: list[Sample], candidates: int) -> Planned:
        last, before = self.buffer.last_taken, self._last
        assert last is not None, "a pool was taken from the buffer"
        came = [] if last is before else self.cursor.arrived_to(last.partition, last.offset)
        self._last = last
        records = tuple(Position(partition.number, offset) for partition, offset in came)
        drawn = tuple(Position(sample.partition.number, sample.offset) for sample in pool)
        return Planned(step, saved, last.partition.topic, records, candidates, drawn)

    def _leave(self, step: int, why: str, *, gone: bool) -> None:
        """Follow the plan no longer. Raises NotAsPlannedError if that is all there is to do."""
        if self.strict:
            raise NotAsPlannedError(f"step {step} cannot be made again: {why}", gone=gone)
        logger.warning("step %d cannot be made as it was planned (%s); the run goes on with what comes", step, why)
        self._entries = {}
        self.cursor.follow(())

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint followed a step when it was first made."""
        entry = self._entries.get(step + 1)
        return entry is not None and entry.planned.saved == step

    def killers(self, step: int) -> list[Position]:
        """Samples of a step that killed processes, as it turned out when it was first made."""
        entry = self._entries.get(step)
        accused = () if entry is None or entry.made is None else entry.made.accused
        return [Position(partition, offset) for partition, offset, why in accused if why == KILLED]

    def accuse(self, sample: Sample, failure: Failure) -> None:
        """Take note of a sample that was taken out of the step."""
        self._accused.append((sample.partition.number, sample.offset, failure.reason))

    def made(self, step: int, whole: StepReport, factor: float) -> StepReport:
        """Write down how a step went. Returns the report as draws are to see it: with the time it took at first."""
        entry = self._entries.get(step)
        if entry is not None and entry.made is not None:
            whole = replace(whole, seconds={"step": entry.made.seconds})
        solver = None if whole.decision.solver is None else whole.decision.solver.status
        line = Made(step, whole.result, solver, whole.own_seconds, factor, tuple(self._accused))
        if entry is not None and entry.made is not None and line != entry.made:
            self._leave(step, f"it was {_told(entry.made)}, and is {_told(line)}", gone=False)
        self.file.append(line)
        return whole


def _difference(then: Planned, now: Planned) -> str:
    """Why a step is not the planned one; empty if it is."""
    same = then.topic == now.topic and then.candidates == now.candidates
    if not same or (then.records and now.records and then.records[-1] != now.records[-1]):
        return GONE
    return "" if then.drawn == now.drawn else "other samples are drawn from the same records"


def _told(made: Made) -> str:
    return f"{made.result}, solver {made.solver}, {len(made.accused)} samples taken out"
