"""The training loop: take a pool, make a step, decide its records; evaluate and checkpoint when it is time.

Nothing is settled before it is durable: records are decided in memory, and a checkpoint makes decisions, weights and
random states durable together. What happened since the last checkpoint is recomputed after a crash.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from gradient_selectors.views.sketches import from_tensors, to_tensors

from stream_trainer import __version__
from stream_trainer.checkpoints.checkpoint import TrainerState, save_checkpoint
from stream_trainer.errors import CheckpointError, SourceError
from stream_trainer.ingest.buffer import Buffer
from stream_trainer.ingest.cursor import Cursor
from stream_trainer.ingest.dead_letters import DeadLetters
from stream_trainer.ingest.thread import Ingest
from stream_trainer.models.loading import LoadedModel
from stream_trainer.monitoring.metrics import Metrics, State
from stream_trainer.records import Outcome, Partition, Sample
from stream_trainer.settings.schema import Settings
from stream_trainer.training.observe import expect_layers, observe_stages, observe_step
from stream_trainer.training.pools import Draws
from stream_trainer.training.step import Learner, StepReport, train_step
from stream_trainer.training.target import mean_loss

logger = logging.getLogger(__name__)

OnStep = Callable[[int, Sequence[Sample], StepReport], None]
OnEvaluation = Callable[[int, Mapping[str, float], float], None]


@dataclass
class Trainer:
    """The loop and what it works with. Runs on the main thread.

    Attributes:
        evaluation_sets: fixed samples by name (`target`, `retention`) whose loss is watched.
        stopped: turns true when the service is told to stop.
        on_step: told of every step, for progress displays.
        on_evaluation: told of every evaluation: step, loss by set, and the seconds it took.
        step: steps made over the life of the model, skipped ones included.
        losses: the last loss of each evaluation set, measured at `evaluated_step`.
    """

    settings: Settings
    loaded: LoadedModel
    learner: Learner
    evaluation_sets: Mapping[str, Sequence[Sample]]
    cursor: Cursor
    buffer: Buffer
    draws: Draws
    ingest: Ingest
    dead_letters: DeadLetters
    metrics: Metrics
    stopped: Callable[[], bool]
    on_step: OnStep | None = None
    on_evaluation: OnEvaluation | None = None
    step: int = 0
    state: State = State.LOADING
    losses: dict[str, float] = field(default_factory=dict)
    evaluated_step: int | None = None
    last_progress: float = field(default_factory=time.monotonic)
    last_report: StepReport | None = None

    def run(self) -> None:
        """Train until stopped, until `training.max_steps`, or until a finite stream ends; then checkpoint.

        Raises what the ingest thread failed with, after a last checkpoint of what was learned before.
        """
        self._last_checkpoint_time, self._durable = time.monotonic(), (self.step, self.cursor.counts)
        expect_layers(self.metrics, self.learner)
        self.evaluate()
        try:
            self._loop()
        except SourceError:
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
        if self._has_news():
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
                self.checkpoint()
                continue
            report = train_step(self.learner, pool)
            self.step += 1
            undrawn = self.draws.settle(report.utilities)
            self._decide(pool, undrawn, report)
            self._observe(pool, undrawn, report, started - asked, time.perf_counter() - started)
            if self.step % self.settings.evaluation.every_steps == 0:
                self.evaluate()
            if self._checkpoint_is_due():
                self.checkpoint()

    def _next_pool(self) -> list[Sample]:
        """Empty only when there is nothing left to do, or a checkpoint became due while none came."""
        if self.buffer.records + self.draws.waiting == 0:
            self.enter(State.IDLE)
        pool = self.draws.pool(lambda: self.stopped() or self._idle_checkpoint_is_due())
        self.enter(State.CATCHING_UP if self.ingest.paused else State.TRAINING)
        return pool

    def _decide(self, pool: Sequence[Sample], undrawn: Sequence[Sample], report: StepReport) -> None:
        chosen = set(report.chosen)
        for i, sample in enumerate((*pool, *undrawn)):
            outcome = Outcome.TRAINED if i in chosen else Outcome.NOT_SELECTED
            self.cursor.decide(sample.partition, sample.offset, outcome)
            self.metrics.records.labels(outcome.value).inc()

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
            loss = mean_loss(self.learner.capture, samples, self.learner.pad_id)
            self.losses[name] = loss
            self.metrics.evaluation_loss.labels(name).set(loss)
            self.metrics.evaluation_time.labels(name).set_to_current_time()
            self.metrics.phase_seconds.labels("evaluate").inc(time.perf_counter() - started)
            logger.info("step %d: %s loss %.4f", self.step, name, loss)
        if self.on_evaluation is not None:
            self.on_evaluation(self.step, dict(self.losses), time.perf_counter() - began)

    def _checkpoint_is_due(self) -> bool:
        return self.step % self.settings.checkpoint.every_steps == 0 or self._checkpoint_is_old()

    def _idle_checkpoint_is_due(self) -> bool:
        """Whether what is decided waits to be made durable although no step is made: after the last of a burst."""
        return self._checkpoint_is_old() and self._has_news()

    def _checkpoint_is_old(self) -> bool:
        return time.monotonic() - self._last_checkpoint_time >= self.settings.checkpoint.every_seconds

    def _has_news(self) -> bool:
        """Whether anything happened since the last checkpoint."""
        return (self.step, self.cursor.counts) != self._durable

    def checkpoint(self) -> None:
        """Make everything durable, then tell the stream how far we are.

        Dead letters are flushed after the snapshot: each of those it counts as decided was sent before.
        """
        started = time.perf_counter()
        snapshot, counts = self.cursor.snapshot(), self.cursor.counts
        try:
            self.dead_letters.flush()
            saved = save_checkpoint(
                self.settings.checkpoint.dir,
                self.loaded,
                self.learner.optimizer,
                self._trainer_state(snapshot),
                self.settings.checkpoint.keep,
            )
        except CheckpointError:
            self.metrics.checkpoint_failures.inc()
            raise
        seconds = time.perf_counter() - started
        self._last_checkpoint_time, self._durable = time.monotonic(), (saved.step, counts)
        self.metrics.checkpoint_seconds.observe(seconds)
        self.metrics.phase_seconds.labels("checkpoint").inc(seconds)
        self.metrics.durable(saved.step, time.time(), saved.bytes)
        logger.info("checkpoint %s: %.0f MB in %.1f s", saved.path, saved.bytes / 1e6, seconds)
        positions = {Partition.parse(name): log["next"] for name, log in snapshot["partitions"].items()}
        self.ingest.request_commit(positions, saved.step)

    def _trainer_state(self, snapshot: dict[str, object]) -> TrainerState:
        target, masking = self.learner.target, self.learner.masking
        averages, counters = masking.method.state() if masking is not None else ({}, {})
        parts = {
            "target": target.gradient if target is not None and target.gradient is not None else {},
            "draw": self.draws.state(),
            "mask": averages,
            "sketch": to_tensors(self.learner.projections or {}),
        }
        return TrainerState(
            step=self.step,
            cursor=snapshot,
            source_identity=dict(self.ingest.identity),
            extra={
                "target_age": target.age if target is not None else 0,
                "target_refreshes": target.refreshes if target is not None else 0,
                "mask": counters,
                "version": __version__,
            },
            tensors={f"{part}.{name}": values for part, tensors in parts.items() for name, values in tensors.items()},
            random={name: generator.get_state() for name, generator in self.learner.generators.items()},
        )

    def restore(self, state: TrainerState) -> None:
        """Take up where a checkpoint left off; weights, optimizer and cursor are restored elsewhere.

        A stage that is on now and was off then begins afresh. Raises CheckpointError if a stage's state does not fit.
        """
        self.step = state.step
        for name, generator in self.learner.generators.items():
            if name in state.random:
                generator.set_state(state.random[name])
        target, masking = self.learner.target, self.learner.masking
        gradient = _part(state, "target")
        if target is not None and gradient:
            target.age, target.refreshes = state.extra["target_age"], state.extra.get("target_refreshes", 1)
            target.gradient = {name: values.to(self.loaded.device) for name, values in gradient.items()}
        if masking is not None and state.extra.get("mask"):
            averages = {name: values.to(self.loaded.device) for name, values in _part(state, "mask").items()}
            masking.method.load_state(averages, state.extra["mask"])
        sketch = {name: values.to(self.loaded.device) for name, values in _part(state, "sketch").items()}
        self.learner.projections = from_tensors(sketch) or None  # without any they are made anew
        try:
            self.draws.load_state(_part(state, "draw"))
        except ValueError as error:
            raise CheckpointError(
                f"selection.cluster_ucb.clusters={self.settings.selection.cluster_ucb.clusters}: {error}"
            ) from error

    def _observe(
        self, pool: Sequence[Sample], undrawn: Sequence[Sample], report: StepReport, waited: float, seconds: float
    ) -> None:
        self.last_progress, self.last_report = time.monotonic(), report
        observe_step(self.metrics, pool, undrawn, report, waited, seconds)
        observe_stages(self.metrics, self.learner, self.draws, report)
        losses = torch.tensor(report.losses)
        logger.debug("step %d: %s, pool loss %.4f, chosen %s", self.step, report.result, losses.mean(), report.chosen)
        if self.on_step is not None:
            self.on_step(self.step, pool, report)


def _part(state: TrainerState, part: str) -> dict[str, torch.Tensor]:
    """The tensors of one stage, by the names it gave them."""
    prefix = f"{part}."
    return {name.removeprefix(prefix): values for name, values in state.tensors.items() if name.startswith(prefix)}
