"""One checkpoint for all ranks: each says what it has decided and whether its letters are safe.

Rank 0 writes. Where a run lies in rows, every rank writes its own, and rank 0 what is left, before it seals all.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gradient_selectors.capture.shards import is_sharded
from gradient_selectors.world.base import gathered

from stream_trainer.checkpoints.background import in_background
from stream_trainer.checkpoints.checkpoint import TrainerState, publish
from stream_trainer.checkpoints.rows import InRows
from stream_trainer.checkpoints.whole import Held, held_whole, in_rows
from stream_trainer.distributed.buffer import SharedBuffer
from stream_trainer.distributed.control import Control, agree_on, by_first, failure_of
from stream_trainer.distributed.cursor import merged
from stream_trainer.distributed.writing import all_written, begin_rows, write_copied, write_share
from stream_trainer.errors import TrainingError
from stream_trainer.ingest.judge import Snapshot
from stream_trainer.records import Outcome, Partition
from stream_trainer.training.faults.moved import sums_of_bits
from stream_trainer.training.saver import Saver, Writing, timed

ELSEWHERE = "dead_letters_elsewhere"  # a checkpoint's part: the letters of all ranks but the first


@dataclass
class SharedSaver(Saver):
    """Of ranks that are alike: rank 0 writes."""

    control: Control = field(kw_only=True)
    buffer: SharedBuffer = field(kw_only=True)

    def __post_init__(self) -> None:
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
        self._write(step, Held(self.loaded, self.optimizer, parts), self._whole(ranks), started)
        if world.rank:
            self._note_written(step, own)

    def _write(self, step: int, held: Held, snapshot: Snapshot, started: float) -> None:
        by_first(self.control.world, lambda: self.write_held(step, held, snapshot, started))

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
        world, own = self.control.world, self.ingest.snapshot()
        trouble = failure_of(self.dead_letters.flush)
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


@dataclass(frozen=True)
class WritingRows(Writing):
    """A checkpoint that all ranks are writing: where, of what, and since when (`time.perf_counter()`)."""

    directory: Path
    state: TrainerState
    started: float


@dataclass
class RowsSaver(SharedSaver):
    """Of a run that lies in rows: every rank writes its own, rank 0 what is left, and seals all."""

    def _write(self, step: int, held: Held, snapshot: Snapshot, started: float) -> None:
        world = self.control.world
        with self.counting_failures():
            directory = begin_rows(world, self.owner, step, held.loaded, held.optimizer)
            share = partial(write_share, directory, held.optimizer.state_dict(), in_rows(held.parts), world)
            rows = all_written(world, self.owner, directory, share)
        with held_whole(replace(held, rows=rows), keeps=world.rank == 0) as whole:
            super()._write(step, whole, snapshot, started)

    def begin_to_write(self, step: int, parts: Mapping[str, Any]) -> None:
        """As `Saver.begin_to_write`, on all ranks together: each copies and writes its own. Raises as `save` does."""
        assert self.copies is not None
        started, world = time.perf_counter(), self.control.world
        own, ranks = self._agreed(step)
        snapshot = self._whole(ranks)
        state = self._state(step, parts, snapshot)
        with self.counting_failures(), self.watchers.during("copying for a checkpoint"):
            by_first(world, lambda: self._make_ready(state))
            directory = begin_rows(world, self.owner, step, self.loaded, self.optimizer)
            copied = self.copies.take(self.loaded, self.optimizer, state)
        written = in_background(partial(write_copied, directory, copied, world))
        self.writing = WritingRows(step, own if world.rank else snapshot, written, directory, copied.state, started)
        self.control.written = False  # that was said of the one before
        self._stalled(started)

    def tell(self, writing: Writing) -> None:
        """Seal what all ranks have written, and tell everybody. Raises on each what any failed with."""
        assert isinstance(writing, WritingRows)
        assert writing.written is not None
        world, started = self.control.world, time.perf_counter()
        with self.counting_failures():
            rows = all_written(world, self.owner, writing.directory, writing.written.result)
            by_first(world, lambda: self._seal(writing, rows, started))
        if world.rank:
            self._note_written(writing.step, writing.snapshot)

    def _seal(self, writing: WritingRows, rows: InRows, started: float) -> None:
        seal = partial(publish, self.settings.checkpoint.dir, rows, writing.state, *self._place())
        self._announce(writing.step, writing.snapshot, timed(seal, writing.started), started)


def fingerprint(model: torch.nn.Module) -> list[int]:
    """What tells weights apart that differ in any bit; of those that lie in rows nothing, for each rank has others."""
    return sums_of_bits(p for p in model.parameters() if p.requires_grad and not is_sharded(p))
