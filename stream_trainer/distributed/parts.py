"""What takes the place of parts of a run where several processes make it: owner, ingest, plan and saver.

Rank 0 writes, and says to all how it went. What a rank reads it decides by itself; the rest is the same everywhere.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gradient_selectors.capture.shards import is_sharded
from gradient_selectors.world.base import World, first, gathered, is_same

from stream_trainer.checkpoints.ownership import Owner, claim
from stream_trainer.checkpoints.whole import Held, held_whole
from stream_trainer.distributed.buffer import SharedBuffer
from stream_trainer.distributed.control import Control, agree_on, by_first, told
from stream_trainer.distributed.cursor import merged, owns
from stream_trainer.distributed.writing import write_rows
from stream_trainer.errors import SourceError, TrainingError
from stream_trainer.ingest.judge import Snapshot
from stream_trainer.ingest.letter import DeadLetter
from stream_trainer.ingest.thread import Ingest
from stream_trainer.records import Outcome, Partition, Sample
from stream_trainer.training.draw.pools import PoolSampler
from stream_trainer.training.faults.culprits import Failure
from stream_trainer.training.faults.moved import sums_of_bits
from stream_trainer.training.planning import Plan
from stream_trainer.training.saver import Saver, Writing
from stream_trainer.training.step import StepReport

ELSEWHERE = "dead_letters_elsewhere"  # a checkpoint's part: the letters of all ranks but the first


@dataclass(frozen=True)
class SharedOwner(Owner):
    """The claim of rank 0, as all ranks know it."""

    world: World = field(kw_only=True)

    @classmethod
    def claim(cls, world: World, directory: Path) -> "SharedOwner":
        """Rank 0 takes the directory over. Raises on all ranks what fails there."""
        found: list[Owner] = []
        by_first(world, lambda: found.append(claim(directory)))
        epoch, words = first(world, [found[0].epoch, found[0].words.decode()] if found else None)
        return cls(directory, epoch, words.encode(), world=world)

    @property
    def writes(self) -> bool:
        return self.world.rank == 0

    def agreed(self, note: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = first(self.world, note)
        return found

    def confirm(self) -> None:
        if self.writes:
            super().confirm()


class SharedIngest(Ingest):
    """Reads this rank's partitions.

    Attributes:
        world: whose partitions are whose.
        everywhere: positions of all partitions in the checkpoint that the run goes on from.
    """

    world: World
    everywhere: Mapping[Partition, int]

    @classmethod
    def of(cls, world: World, decided: Mapping[str, Any] | None, *parts: Any) -> "SharedIngest":
        """With the parts of any ingest; `decided` is the cursor of the whole checkpoint, None without one."""
        ingest = cls(*parts)
        partitions = {} if decided is None else decided["partitions"]
        ingest.world = world
        ingest.everywhere = {Partition.parse(name): log["next"] for name, log in partitions.items()}
        return ingest

    def start(self, positions: Mapping[Partition, int], identity: Mapping[str, str]) -> None:
        super().start({**self.everywhere, **positions}, identity)

    def dead_letter(self, letter: DeadLetter) -> None:
        if owns(self.world, letter.record.partition.number):
            super().dead_letter(letter)


@dataclass
class SharedPlan(Plan):
    """No step is planned: what comes when, on several processes, is not written down, so nothing is made again."""

    world: World = field(kw_only=True)

    def begin(self, step: int, *, follow: bool) -> None:  # noqa: ARG002
        if self.world.rank == 0:
            self.file.begin(step, follow=False)

    def next(self, sampler: PoolSampler, step: int, saved: int | None, stopped: Callable[[], bool]) -> list[Sample]:  # noqa: ARG002
        pool = sampler.next(stopped)
        drawn = [(sample.partition.number, sample.offset) for sample in pool]
        if not all(is_same(self.world, json.dumps([drawn, sampler.scores]).encode())):
            raise TrainingError(
                f"selection.draw: the ranks drew other samples for step {step} from the same ones; start again, on "
                "machines of one kind"
            )
        return pool

    def accuse(self, sample: Sample, failure: Failure) -> None:
        """Nothing is written down."""

    def made(self, step: int, whole: StepReport, factor: float) -> StepReport:  # noqa: ARG002
        """The report with rank 0's times: draws that learn from them learn the same everywhere."""
        return replace(whole, seconds=first(self.world, dict(whole.seconds)))


@dataclass
class SharedSaver(Saver):
    """One checkpoint for all ranks: each says what it has decided and whether its letters are safe; rank 0 writes."""

    control: Control = field(kw_only=True)
    buffer: SharedBuffer = field(kw_only=True)

    def __post_init__(self) -> None:
        if self.control.world.rank == 0:
            self.control.own_written = lambda: self.writing is not None and self.writing.is_over

    @property
    def is_written(self) -> bool:
        """The same answer on all ranks."""
        return self.writing is not None and self.control.written

    def has_news(self, step: int) -> bool:
        return self.control.any(super().has_news(step) or self.dead_letters.held > 0)

    def save(self, step: int, parts: Mapping[str, Any]) -> None:
        """As `Saver.save`, on all ranks together.

        Raises on each what rank 0, or the letters of any, failed with, and TrainingError if weights are not the same.
        """
        started, world = time.perf_counter(), self.control.world
        own, ranks = self._agreed(step)
        held = Held(self.loaded, self.optimizer, parts)
        with self.counting_failures():
            held = replace(held, rows=write_rows(world, self.owner, step, held))
        with held_whole(held, keeps=world.rank == 0) as whole:
            by_first(world, lambda: self.write_held(step, whole, self._whole(ranks), started))
        if world.rank:
            self._note_written(step, own)

    def begin_to_write(self, step: int, parts: Mapping[str, Any]) -> None:
        """As `Saver.begin_to_write`, on all ranks together: rank 0 copies and writes. Raises as `save` does."""
        started, world = time.perf_counter(), self.control.world
        own, ranks = self._agreed(step)
        by_first(world, lambda: self.begin_from(step, parts, self._whole(ranks), started))
        if world.rank:
            self.writing = Writing(step, own, None)
        self.control.written = False  # that was said of the one before

    def tell(self, writing: Writing) -> None:
        """As `Saver.tell`, on all ranks together."""
        by_first(self.control.world, partial(super().tell, writing))
        if self.control.world.rank:
            self._note_written(writing.step, writing.snapshot)

    def _agreed(self, step: int) -> tuple[Snapshot, list[dict[str, Any]]]:
        """What this rank has decided, whose letters are safe now, and what all ranks have. Raises as `save` does."""
        world, own, trouble = self.control.world, self.ingest.snapshot(), None
        try:
            self.dead_letters.flush()
        except SourceError as error:
            trouble = told(error)
        known = {"cursor": own.cursor, "parts": own.parts, "weights": fingerprint(self.loaded.model)}
        agree_on(world, trouble)
        ranks = gathered(world, known)
        if any(rank["weights"] != ranks[0]["weights"] for rank in ranks):
            raise TrainingError(
                f"distributed.mode={self.settings.distributed.mode}: the ranks' weights are no longer the same at step "
                f"{step}, so nothing is written; start again, on machines of one kind"
            )
        return own, ranks

    def _note_written(self, step: int, own: Snapshot) -> None:
        """Of a rank that writes nothing: it tells the stream how far its own partitions are."""
        self.note_saved(step, own.counts)
        self.metrics.durable(step, time.time(), 0)
        positions = {Partition.parse(name): log["next"] for name, log in own.cursor["partitions"].items()}
        self.ingest.request_commit(positions, step)

    def _whole(self, ranks: list[dict[str, Any]]) -> Snapshot:
        last = self.buffer.last_taken
        cursor = merged([rank["cursor"] for rank in ranks], None if last is None else str(last.partition))
        parts = [rank["parts"] for rank in ranks]
        poison = {name: state for part in parts for name, state in part["poison"].items()}
        elsewhere = {str(rank): part["dead_letters"] for rank, part in enumerate(parts) if rank}
        counts = {Outcome(name): count for name, count in cursor["counts"].items()}
        return Snapshot(cursor, counts, {**parts[0], "poison": poison, ELSEWHERE: elsewhere})


def fingerprint(model: torch.nn.Module) -> list[int]:
    """What tells weights apart that differ in any bit; of those that lie in rows nothing, for each rank has others."""
    return sums_of_bits(p for p in model.parameters() if p.requires_grad and not is_sharded(p))
