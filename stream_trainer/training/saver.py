"""When a checkpoint is due, and making it: weights, state and decisions durable together, then the stream is told.

Where the settings say so, it is copied between two steps and written while training goes on. The stream is told between
two later steps.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from gradient_selectors import MaskedAdamW

from stream_trainer import __version__
from stream_trainer.checkpoints.background import Copies, in_background
from stream_trainer.checkpoints.checkpoint import (
    Moments,
    SavedCheckpoint,
    TrainerState,
    require_finite,
    save_checkpoint,
)
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


Writer = Callable[[], SavedCheckpoint]


@dataclass(frozen=True)
class Written:
    """A checkpoint that is durable, the seconds that it took from the first look on, and when it was (Unix time)."""

    saved: SavedCheckpoint
    seconds: float
    at: float


@dataclass(frozen=True)
class Writing:
    """A checkpoint that is being written while training goes on.

    Attributes:
        snapshot: what it holds as decided.
        written: what comes of what this process writes; None where another one writes.
    """

    step: int
    snapshot: Snapshot
    written: Future[Any] | None

    @property
    def is_over(self) -> bool:
        """Whether it is durable, or failed, as far as this process writes it."""
        return self.written is None or self.written.done()


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
        copies: of the run, if this process writes them while training goes on.
        writing: the checkpoint that is being written while training goes on; None if none is.
        on_saved: is told the step of every checkpoint that is durable.
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
    copies: Copies | None = None
    on_saved: Callable[[int], None] = lambda step: None  # noqa: ARG005
    writing: Writing | None = field(default=None, init=False)
    _time: float = field(default=0.0, init=False)
    _durable: object = field(default=None, init=False)
    _stall: float = field(default=0.0, init=False)

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
        if self.writing is not None:
            return False
        if self.failing is not None:
            return self.clock() >= self.failing.retry_at
        return self.clock() - self._time >= self.settings.checkpoint.every_seconds

    def save_or_retry(self, step: int, parts: Mapping[str, Any], *, durable: bool) -> None:
        """Save; if that fails train on and try again later, for `checkpoint.max_failing_s` seconds.

        Unless it has to be `durable` at once, it may go on being written while training goes on.
        """
        with self._retrying(step):
            if durable or not self.settings.checkpoint.asynchronous:
                self.save(step, parts)
            else:
                self.begin_to_write(step, parts)

    @contextmanager
    def _retrying(self, step: int) -> Iterator[None]:
        try:
            yield
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
        state = self._state(step, held.parts, snapshot)
        with self.counting_failures():
            self._make_ready(state)
            write = self._writer(held.loaded, held.optimizer, state, rows=held.rows)
            with self.watchers.during("writing a checkpoint"):
                written = timed(write, started)
        self._announce(step, snapshot, written, started)

    def begin_to_write(self, step: int, parts: Mapping[str, Any]) -> None:
        """Copy what `save` would write, and have it written while training goes on; `look` tells what came of it."""
        self.begin_from(step, parts, self.ingest.snapshot(), time.perf_counter())

    def begin_from(self, step: int, parts: Mapping[str, Any], snapshot: Snapshot, started: float) -> None:
        """The same of what is decided in `snapshot`."""
        assert self.copies is not None
        state = self._state(step, parts, snapshot)
        with self.counting_failures():
            self._make_ready(state)
            require_finite(self.loaded, self.optimizer)
            with self.watchers.during("copying for a checkpoint"):
                copied = self.copies.take(self.loaded, self.optimizer, state)
        write = self._writer(copied.loaded, copied, copied.state, checked=True)
        self.writing = Writing(step, snapshot, in_background(partial(timed, write, started)))
        self._stalled(started)

    @property
    def newest(self) -> int | None:
        """Step of the newest checkpoint, durable or still being written; None before there is one."""
        return self.saved if self.writing is None else self.writing.step

    @property
    def is_written(self) -> bool:
        """Whether what was being written is durable, or failed, so that it is time to `look`."""
        return self.writing is not None and self.writing.is_over

    def look(self) -> None:
        """Tell everybody of a checkpoint that became durable meanwhile. One that failed is tried again later.

        Raises what it failed with where `save_or_retry` does.
        """
        if self.is_written:
            self._end()

    def settle(self) -> None:
        """Wait until nothing is being written, and `look`."""
        if self.writing is not None:
            started = time.perf_counter()
            with self.watchers.during("waiting for a checkpoint"):
                self.wait()
            self._stalled(started)
            self._end()

    def wait(self) -> None:
        """Wait until nothing is being written. Nobody is told what came of it."""
        if self.writing is not None and self.writing.written is not None:
            self.writing.written.exception()

    def _end(self) -> None:
        writing, self.writing = self.writing, None
        assert writing is not None
        with self._retrying(writing.step):
            self.tell(writing)

    def tell(self, writing: Writing) -> None:
        """Tell everybody of what is durable. Raises what it failed with."""
        assert writing.written is not None
        started = time.perf_counter()
        with self.counting_failures():
            written: Written = writing.written.result()
        self._announce(writing.step, writing.snapshot, written, started)

    def _state(self, step: int, parts: Mapping[str, Any], snapshot: Snapshot) -> TrainerState:
        return TrainerState(
            step=step,
            cursor=snapshot.cursor,
            source_identity=dict(self.ingest.identity),
            version=__version__,
            fingerprint=self.fingerprint | consumed(self.settings.source, snapshot.cursor),
            parts={**parts, **snapshot.parts},
            made_with=self.made_with,
        )

    def _make_ready(self, state: TrainerState) -> None:
        """Make durable what a checkpoint counts on."""
        self._stall = 0.0
        self.owner.confirm()
        self.dead_letters.flush()
        self.plan.flush()
        if self.ledger is not None:
            self.ledger.write(sum(state.cursor["counts"].values()), state.step)

    def _writer(self, loaded: LoadedModel, optimizer: Moments, state: TrainerState, **how: Any) -> Writer:
        return partial(save_checkpoint, self.settings.checkpoint.dir, loaded, optimizer, state, *self._place(), **how)

    def _place(self) -> tuple[int, int, Callable[[], None], Callable[[], None]]:
        """What whoever writes a checkpoint asks about its place."""
        before_rename = partial(self.ingest.confirm, self.saved or 0)
        return self.settings.checkpoint.keep, self.owner.epoch, self.owner.confirm, before_rename

    def _announce(self, step: int, snapshot: Snapshot, written: Written, since: float) -> None:
        """Tell everybody that a checkpoint is durable, for which training stands still `since`."""
        self.note_saved(step, snapshot.counts)
        self.plan.prune()
        if self.ledger is not None:
            self.ledger.saved()
        self._stalled(since)
        self.metrics.checkpoint_stall_seconds.observe(self._stall)
        self._stall = 0.0
        self.metrics.checkpoint_seconds.observe(written.seconds)
        saved, positions = written.saved, snapshot.cursor["partitions"].items()
        self.metrics.durable(step, written.at, saved.bytes)
        logger.info("checkpoint %s: %.0f MB in %.1f s", saved.path, saved.bytes / 1e6, written.seconds)
        self.ingest.request_commit({Partition.parse(name): log["next"] for name, log in positions}, step)
        self.watchers.checkpoint(step, saved.path)

    def _stalled(self, since: float) -> None:
        """Count time in which no step was made."""
        seconds = time.perf_counter() - since
        self._stall += seconds
        self.metrics.phase_seconds.inc(seconds, "checkpoint")

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
        self.on_saved(step)


def timed(write: Writer, started: float) -> Written:
    """Write, and tell how long it took since `started` (`time.perf_counter()`)."""
    saved = write()
    return Written(saved, time.perf_counter() - started, time.time())
