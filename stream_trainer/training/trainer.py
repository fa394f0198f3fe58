"""The training loop: take a pool, make a step, decide its records; evaluate and checkpoint when it is time.

Nothing is settled before it is durable: records are decided in memory, and a checkpoint makes decisions, weights and
random states durable together. What happened since the last checkpoint is recomputed after a crash.
"""

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from gradient_selectors import MaskedAdamW, SelectionEngine
from gradient_selectors.state import load_states, states_of
from gradient_selectors.target import mean_loss

from stream_trainer import __version__
from stream_trainer.checkpoints.checkpoint import TrainerState, save_checkpoint
from stream_trainer.checkpoints.fingerprint import consumed
from stream_trainer.checkpoints.ownership import Owner
from stream_trainer.errors import CheckpointError, NotFiniteError, PoisonError, SourceError
from stream_trainer.ingest.buffer import Buffer
from stream_trainer.ingest.cursor import Cursor
from stream_trainer.ingest.dead_letters import DeadLetters
from stream_trainer.ingest.judge import Snapshot
from stream_trainer.ingest.thread import Ingest
from stream_trainer.models.loading import LoadedModel
from stream_trainer.monitoring.metrics import Metrics, State
from stream_trainer.records import Outcome, Partition, Sample
from stream_trainer.samples.collate import collate
from stream_trainer.settings.schema import Settings
from stream_trainer.training.failing import Failing, failed_again
from stream_trainer.training.observe import expect_layers, observe_stages, observe_step
from stream_trainer.training.optimizer import NamedAdamW
from stream_trainer.training.pools import PoolSampler
from stream_trainer.training.step import StepReport, train_step

logger = logging.getLogger(__name__)

OWNER_LOOK_S = 5.0  # between looks whether another trainer has taken over

OnStep = Callable[[int, Sequence[Sample], StepReport], None]
OnEvaluation = Callable[[int, Mapping[str, float], float], None]


@dataclass
class Trainer:
    """The loop and what it works with. Runs on the main thread.

    Attributes:
        evaluation_sets: fixed samples by name (`target`, `retention`) whose loss is watched.
        owner: of the directory of checkpoints.
        fingerprint: what the run is made with, for its checkpoints.
        jitter: source of what pauses between tries vary by.
        stopped: turns true when the service is told to stop.
        on_step: told of every step, for progress displays.
        on_evaluation: told of every evaluation: step, loss by set, and the seconds it took.
        step: steps made over the life of the model, skipped ones included.
        losses: the last loss of each evaluation set, measured at `evaluated_step`.
        failing: while checkpoints cannot be written, since when and why.
        changed: what the resumed checkpoint was made with and is other now, by name.
    """

    settings: Settings
    loaded: LoadedModel
    optimizer: NamedAdamW | MaskedAdamW
    engine: SelectionEngine
    evaluation_sets: Mapping[str, Sequence[Sample]]
    cursor: Cursor
    buffer: Buffer
    sampler: PoolSampler
    ingest: Ingest
    dead_letters: DeadLetters
    metrics: Metrics
    owner: Owner
    fingerprint: dict[str, object]
    jitter: random.Random
    stopped: Callable[[], bool]
    on_step: OnStep | None = None
    on_evaluation: OnEvaluation | None = None
    step: int = 0
    state: State = State.LOADING
    losses: dict[str, float] = field(default_factory=dict)
    evaluated_step: int | None = None
    last_progress: float = field(default_factory=time.monotonic)
    last_report: StepReport | None = None
    failing: Failing | None = None
    changed: Sequence[str] = ()

    def run(self) -> None:
        """Train until stopped, until `training.max_steps`, or until a finite stream ends; then checkpoint.

        Raises what the ingest thread failed with, after a last checkpoint of what was learned before; FencedError,
        without one, if another trainer has taken over; CheckpointError if checkpoints fail for too long, or at the end.
        """
        self._last_checkpoint_time, self._durable = time.monotonic(), (self.step, self.cursor.counts)
        self._owner_seen = time.monotonic()
        expect_layers(self.metrics, self.engine)
        self.evaluate()
        try:
            self._loop()
        except (SourceError, PoisonError):
            # The stream failed between two steps: what was learned is whole, and is kept.
            try:
                self._drain()
            except CheckpointError as error:  # a full disk stops both; the first failure is the one to report
                logger.error("%s", error)
            raise
        self._drain()
        if not self.stopped():
            self.evaluate()

    def _drain(self) -> None:
        self.enter(State.DRAINING)
        self.ingest.stop_reading()  # else a record could be dead-lettered after the snapshot, and again after a restart
        if self._has_news() or self.dead_letters.held:
            self.checkpoint()

    def _loop(self) -> None:
        limit = self.settings.training.max_steps
        while not self.stopped() and (limit is None or self.step < limit):
            asked = time.perf_counter()
            pool = self._next_pool()
            started = time.perf_counter()
            if not pool:
                if self.stopped() or not self._idle_checkpoint_is_due():
                    return
                self._checkpoint_or_retry()
                continue
            scores, rates = self.sampler.scores, self.settings.optimizer
            report = train_step(self.engine, pool, self._pad_id, rates, scores=scores)
            self.step += 1
            undrawn = self.sampler.feedback(report)
            self._resolve(pool, undrawn, report)
            self._observe(pool, undrawn, report, started - asked, time.perf_counter() - started)
            if self.step % self.settings.evaluation.every_steps == 0:
                self.evaluate()
            if self._checkpoint_is_due():
                self._checkpoint_or_retry()

    def _next_pool(self) -> list[Sample]:
        """Empty only when there is nothing left to do, or a checkpoint became due while none came."""
        if self.buffer.records + self.sampler.waiting == 0:
            self.enter(State.IDLE)
        pool = self.sampler.next(self._is_interrupted)
        self.enter(State.CATCHING_UP if self.ingest.paused else State.TRAINING)
        return pool

    def _is_interrupted(self) -> bool:
        """Whether to wait no longer for samples. Raises FencedError as soon as it is known."""
        if time.monotonic() - self._owner_seen >= OWNER_LOOK_S:
            self._owner_seen = time.monotonic()
            with suppress(CheckpointError):  # the next checkpoint tells
                self.owner.confirm()
        return self.stopped() or self._idle_checkpoint_is_due()

    def _resolve(self, pool: Sequence[Sample], undrawn: Sequence[Sample], report: StepReport) -> None:
        selected = set(report.selected)
        for i, sample in enumerate((*pool, *undrawn)):
            outcome = Outcome.TRAINED if i in selected else Outcome.NOT_SELECTED
            self.cursor.resolve(sample.partition, sample.offset, outcome)

    @property
    def _pad_id(self) -> int:
        return int(self.loaded.tokenizer.pad_token_id)

    @property
    def _parts(self) -> dict[str, object]:
        """Whatever has state beside model, optimizer and cursor, by the name it has in a checkpoint.

        The ingest thread's parts change while a checkpoint is made: a snapshot holds their state.
        """
        return {"engine": self.engine, "sampler": self.sampler}

    def enter(self, state: State) -> None:
        """Go to a state, and count that as progress."""
        self.state = state
        self.last_progress = time.monotonic()
        self.metrics.state.state(state.value)

    def evaluate(self) -> None:
        """Measure the loss of every evaluation set, once a step."""
        if self.evaluated_step == self.step:
            return
        self.evaluated_step = self.step
        began = time.perf_counter()
        for name, samples in self.evaluation_sets.items():
            if self.stopped():
                return
            started = time.perf_counter()
            loss = mean_loss(self.engine.capture, [collate(samples, self._pad_id)])
            self.losses[name] = loss
            self.metrics.evaluation_loss.labels(name).set(loss)
            self.metrics.evaluation_time.labels(name).set_to_current_time()
            self.metrics.phase_seconds.labels("evaluate").inc(time.perf_counter() - started)
            logger.info("step %d: %s loss %.4f", self.step, name, loss)
        if self.on_evaluation is not None:
            self.on_evaluation(self.step, dict(self.losses), time.perf_counter() - began)

    def _checkpoint_is_due(self) -> bool:
        by_steps = self.failing is None and self.step % self.settings.checkpoint.every_steps == 0
        return by_steps or self._checkpoint_is_old()

    def _idle_checkpoint_is_due(self) -> bool:
        """Whether what is decided waits to be made durable although no step is made: after the last of a burst."""
        return self._checkpoint_is_old() and self._has_news()

    def _checkpoint_is_old(self) -> bool:
        if self.failing is not None:
            return time.monotonic() >= self.failing.retry_at
        return time.monotonic() - self._last_checkpoint_time >= self.settings.checkpoint.every_seconds

    def _has_news(self) -> bool:
        """Whether anything happened since the last checkpoint."""
        return (self.step, self.cursor.counts) != self._durable

    def _checkpoint_or_retry(self) -> None:
        """Checkpoint; if that fails train on and try again later, for `checkpoint.max_failing_s` seconds."""
        try:
            self.checkpoint()
        except NotFiniteError:
            raise  # the disk is well, and time mends nothing
        except CheckpointError as error:
            now, limit = time.monotonic(), self.settings.checkpoint.max_failing_s
            self.failing = failed_again(self.failing, error, now, self.jitter)
            self.metrics.degraded.labels("checkpoint").set(1)
            if now - self.failing.since >= limit:
                raise CheckpointError(f"{error}; this lasts longer than checkpoint.max_failing_s={limit:g}") from error
            logger.error("%s; training goes on, next try in %.0f s", error, self.failing.retry_at - now)

    def checkpoint(self) -> None:
        """Make everything durable, then tell the stream how far we are.

        Dead letters are flushed after the snapshot: each of those it counts as decided was kept before. Raises
        CheckpointError if it cannot be written, FencedError if another trainer has taken over.
        """
        started = time.perf_counter()
        snapshot = self.ingest.snapshot()
        positions = {Partition.parse(name): log["next"] for name, log in snapshot.cursor["partitions"].items()}
        try:
            self.owner.confirm()
            self.dead_letters.flush()
            saved = save_checkpoint(
                self.settings.checkpoint.dir,
                self.loaded,
                self.optimizer,
                self._trainer_state(snapshot),
                self.settings.checkpoint.keep,
                self.owner.epoch,
                self.owner.confirm,
                before_rename=partial(self.ingest.confirm, positions, self.step),
            )
        except CheckpointError:
            self.metrics.checkpoint_failures.inc()
            raise
        if self.failing is not None:
            logger.info("checkpoints can be written again, after %.0f s", time.monotonic() - self.failing.since)
            self.failing = None
        self.metrics.degraded.labels("checkpoint").set(0)
        seconds = time.perf_counter() - started
        self._last_checkpoint_time, self._durable = time.monotonic(), (saved.step, snapshot.counts)
        self.metrics.checkpoint_seconds.observe(seconds)
        self.metrics.phase_seconds.labels("checkpoint").inc(seconds)
        self.metrics.durable(saved.step, time.time(), saved.bytes)
        logger.info("checkpoint %s: %.0f MB in %.1f s", saved.path, saved.bytes / 1e6, seconds)
        self.ingest.request_commit(positions, saved.step)

    def _trainer_state(self, snapshot: Snapshot) -> TrainerState:
        return TrainerState(
            step=self.step,
            cursor=snapshot.cursor,
            source_identity=dict(self.ingest.identity),
            version=__version__,
            fingerprint=self.fingerprint | consumed(self.settings.source, snapshot.cursor),
            parts={**states_of(self._parts), **snapshot.parts},
        )

    def restore(self, state: TrainerState) -> None:
        """Take up where a checkpoint left off; model, optimizer and cursor are restored elsewhere.

        A part that is on now and was off then begins afresh. Raises CheckpointError if a part's state does not fit.
        """
        self.step = state.step
        try:
            load_states({**self._parts, **self.ingest.parts}, state.parts)
        except (ValueError, KeyError) as error:  # a name that is missing is that of another selector's state
            raise CheckpointError(
                f"the state of the selection does not fit ({error}); restore the settings it was made with, "
                "or set another checkpoint.dir"
            ) from error

    def _observe(
        self, pool: Sequence[Sample], undrawn: Sequence[Sample], report: StepReport, waited: float, seconds: float
    ) -> None:
        self.last_progress, self.last_report = time.monotonic(), report
        observe_step(self.metrics, pool, undrawn, report, waited, seconds)
        if self.settings.selection.mask != "none":
            self.metrics.mask_density.set(self.optimizer.density)
        observe_stages(self.metrics, self.engine, self.sampler, report)
        losses = torch.tensor(report.losses)
        logger.debug(
            "step %d: %s, pool loss %.4f, selected %s", self.step, report.result, losses.mean(), report.selected
        )
        if self.on_step is not None:
            self.on_step(self.step, pool, report)
