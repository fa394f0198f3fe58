"""When a checkpoint is due, and making it: weights, state and decisions durable together, then the stream is told."""

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from gradient_selectors import MaskedAdamW

from stream_trainer import __version__
from stream_trainer.checkpoints.checkpoint import TrainerState, save_checkpoint
from stream_trainer.checkpoints.fingerprint import consumed
from stream_trainer.checkpoints.ownership import Owner
from stream_trainer.checkpoints.plan import PlanFile
from stream_trainer.checkpoints.whole import Held
from stream_trainer.errors import CheckpointError, NotFiniteError
from stream_trainer.ingest.cursor import Cursor
from stream_trainer.ingest.dead_letters import DeadLetters
from stream_trainer.ingest.judge import Snapshot
from stream_trainer.ingest.thread import Ingest
from stream_trainer.models.loading import LoadedModel
from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.records import Decisions, Partition
from stream_trainer.settings.schema import Settings
from stream_trainer.training.failing import Failing, failed_again
from stream_trainer.training.optimizer import NamedAdamW
from stream_trainer.training.watchers import Watchers

logger = logging.getLogger(__name__)


@dataclass
class Saver:
    """Makes the run's checkpoints.

    Attributes:
        owner: of the directory of checkpoints.
        plan: what the steps are made of, which is made durable before each checkpoint.
        fingerprint: what the run is made with.
        made_with: what the manifest says of that, for people.
        jitter: source of what pauses between tries vary by.
        watchers: told of every checkpoint, and of those that fail.
        failing: while checkpoints cannot be written, since when and why.
        saved: step of the newest checkpoint; None before there is one.
        ledger: keeps what is decided, made durable with each checkpoint; None if nobody does.
        clock: seconds, from any moment on.
    """

    settings: Settings
    loaded: LoadedModel
    optimizer: NamedAdamW | MaskedAdamW
    cursor: Cursor
    ingest: Ingest
    dead_letters: DeadLetters
    metrics: Metrics
    owner: Owner
    plan: PlanFile
    fingerprint: dict[str, object]
    made_with: dict[str, Any]
    jitter: random.Random
    watchers: Watchers
    failing: Failing | None = None
    saved: int | None = None
    ledger: Decisions | None = None
    clock: Callable[[], float] = time.monotonic
    _time: float = field(default=0.0, init=False)
    _durable: object = field(default=None, init=False)

    def begin(self, step: int) -> None:
        """Take note that the run begins at a step, with nothing to save."""
        self._time, self._durable = self.clock(), (step, self.cursor.counts)

    def is_due(self, step: int) -> bool:
        """Whether it is time, after a step."""
        by_steps = self.failing is None and step % self.settings.checkpoint.every_steps == 0
        return by_steps or self._is_old()

    def is_due_while_idle(self, step: int) -> bool:
        """Whether what is decided waits to be made durable although no step is made: after the last of a burst."""
        return self._is_old() and self.has_news(step)

    def has_news(self, step: int) -> bool:
        """Whether anything happened since the last checkpoint."""
        return (step, self.cursor.counts) != self._durable

    def _is_old(self) -> bool:
        if self.failing is not None:
            return self.clock() >= self.failing.retry_at
        return self.clock() - self._time >= self.settings.checkpoint.every_seconds

    def save_or_retry(self, step: int, parts: Mapping[str, Any]) -> None:
        """Save; if that fails train on and try again later, for `checkpoint.max_failing_s` seconds."""
        try:
            self.save(step, parts)
        except NotFiniteError:
            raise  # the disk is well, and time mends nothing
        except CheckpointError as error:
            now, limit = self.clock(), self.settings.checkpoint.max_failing_s
            if self.failing is None:
                self.watchers.event(step, "checkpoint_failed", str(error))
            self.failing = failed_again(self.failing, error, now, self.jitter)
            self.metrics.degraded.labels("checkpoint").set(1)
            if now - self.failing.since >= limit:
                raise CheckpointError(f"{error}; this lasts longer than checkpoint.max_failing_s={limit:g}") from error
            logger.error("%s; training goes on, next try in %.0f s", error, self.failing.retry_at - now)

    def save(self, step: int, parts: Mapping[str, Any]) -> None:
        """Make everything durable, then tell the stream how far we are. `parts` are states by name.

        Dead letters are flushed after the snapshot: each of those it counts as decided was kept before. Raises
        CheckpointError if it cannot be written, FencedError if another trainer has taken over.
        """
        self.write(step, parts, self.ingest.snapshot())

    def write(self, step: int, parts: Mapping[str, Any], snapshot: Snapshot) -> None:
        """Make durable what is decided in `snapshot`, and all else. Raises as `save` does."""
        self.write_held(step, Held(self.loaded, self.optimizer, parts), snapshot, time.perf_counter())

    def write_held(self, step: int, held: Held, snapshot: Snapshot, started: float) -> None:
        """The same of a run that is held as `held` says; `started` is when that began (`time.perf_counter()`)."""
        decided = sum(snapshot.cursor["counts"].values())
        positions = {Partition.parse(name): log["next"] for name, log in snapshot.cursor["partitions"].items()}
        state = TrainerState(
            step=step,
            cursor=snapshot.cursor,
            source_identity=dict(self.ingest.identity),
            version=__version__,
            fingerprint=self.fingerprint | consumed(self.settings.source, snapshot.cursor),
            parts={**held.parts, **snapshot.parts},
            made_with=self.made_with,
        )
        with self.counting_failures():
            self.owner.confirm()
            self.dead_letters.flush()
            self.plan.flush()
            if self.ledger is not None:
                self.ledger.write(decided, step)
            with self.watchers.during("writing a checkpoint"):
                saved = save_checkpoint(
                    self.settings.checkpoint.dir,
                    held.loaded,
                    held.optimizer,
                    state,
                    self.settings.checkpoint.keep,
                    self.owner.epoch,
                    self.owner.confirm,
                    before_rename=partial(self.ingest.confirm, self.saved or 0),
                    rows=held.rows,
                )
        self.note_saved(step, snapshot.counts)
        self.plan.prune()
        if self.ledger is not None:
            self.ledger.saved()
        seconds = time.perf_counter() - started
        self.metrics.checkpoint_seconds.observe(seconds)
        self.metrics.phase_seconds.inc(seconds, "checkpoint")
        self.metrics.durable(step, time.time(), saved.bytes)
        logger.info("checkpoint %s: %.0f MB in %.1f s", saved.path, saved.bytes / 1e6, seconds)
        self.ingest.request_commit(positions, step)
        self.watchers.checkpoint(step, saved.path)

    @contextmanager
    def counting_failures(self) -> Iterator[None]:
        """Count a checkpoint that cannot be written."""
        try:
            yield
        except CheckpointError:
            self.metrics.checkpoint_failures.inc()
            raise

    def note_saved(self, step: int, counts: object) -> None:
        """Take note that a checkpoint is durable, which holds these counts."""
        if self.failing is not None:
            logger.info("checkpoints can be written again, after %.0f s", self.clock() - self.failing.since)
            self.failing = None
        self.metrics.degraded.labels("checkpoint").set(0)
        self.saved, self._time, self._durable = step, self.clock(), (step, counts)
