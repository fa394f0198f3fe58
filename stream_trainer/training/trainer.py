"""The training loop: take a pool, make a step, decide its records; evaluate and checkpoint when it is time.

Nothing is settled before it is durable: records are decided in memory, and a checkpoint makes decisions, weights and
random states durable together. What happened since the last checkpoint is recomputed after a crash.

A model that is not finite is never saved: it goes back to the last checkpoint. A sample that a step fails on is
dead-lettered, and the step made without it (`faults`).
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import InitVar, dataclass, field
from itertools import zip_longest
from typing import NoReturn

from gradient_selectors import MaskedAdamW, SelectionEngine
from gradient_selectors.state import load_states, states_of

from stream_trainer.checkpoints.checkpoint import TrainerState, load_latest, restore
from stream_trainer.errors import CheckpointError, PoisonError, SourceError, TrainingError
from stream_trainer.ingest.buffer import Buffer
from stream_trainer.ingest.cursor import Cursor
from stream_trainer.ingest.letter import DeadLetter
from stream_trainer.ingest.thread import Ingest
from stream_trainer.models.loading import LoadedModel
from stream_trainer.monitoring.laps import Rest
from stream_trainer.monitoring.metrics import Metrics, State
from stream_trainer.records import Outcome, Record, Sample
from stream_trainer.samples.collate import collate
from stream_trainer.settings.schema import Settings
from stream_trainer.training.control.steering import Steering
from stream_trainer.training.draw.paying import Paying
from stream_trainer.training.draw.pools import PoolSampler
from stream_trainer.training.draw.verdict import note_advantage
from stream_trainer.training.evaluations import Evaluations
from stream_trainer.training.faults.attempts import Attempts
from stream_trainer.training.faults.culprits import Failure, Made
from stream_trainer.training.faults.recovery import Recovery
from stream_trainer.training.faults.soundness import why_unsound
from stream_trainer.training.faults.steps import Steps
from stream_trainer.training.observe import expect_layers, observe_stages, observe_step
from stream_trainer.training.optimizer import NamedAdamW
from stream_trainer.training.planning import Plan
from stream_trainer.training.saver import Saver
from stream_trainer.training.step import StepReport
from stream_trainer.training.watchers import Watchers

CONTROL_SAMPLES = 8  # of the target set, which a model that is alive has a finite loss on

logger = logging.getLogger(__name__)

OWNER_LOOK_S = 5.0  # between looks whether another trainer has taken over


@dataclass
class Trainer:
    """The loop and what it works with. Runs on the main thread.

    Attributes:
        saver: makes the checkpoints.
        plan: has what each step is made of, and was made of before a crash.
        stopped: turns true when the service is told to stop.
        watchers: told of whatever happens.
        step: steps made over the life of the model, skipped ones included.
        evaluations: the fixed samples by name (`target`, `retention`) whose loss is watched, and their losses.
        changed: what the resumed checkpoint was made with and is other now, by name.
        steering: obeys orders between two steps.
        recovery: what went wrong lately, and what follows from it.
    """

    settings: Settings
    loaded: LoadedModel
    optimizer: NamedAdamW | MaskedAdamW
    engine: SelectionEngine
    evaluation_sets: InitVar[Mapping[str, Sequence[Sample]]]
    cursor: Cursor
    buffer: Buffer
    sampler: PoolSampler
    paying: Paying
    ingest: Ingest
    saver: Saver
    plan: Plan
    metrics: Metrics
    stopped: Callable[[], bool]
    watchers: Watchers = field(default_factory=Watchers)
    step: int = 0
    state: State = State.LOADING
    last_progress: float = field(default_factory=time.monotonic)
    last_report: StepReport | None = None
    last_undrawn: Sequence[Sample] = ()
    changed: Sequence[str] = ()
    steering: Steering = field(default_factory=Steering)
    recovery: Recovery = field(init=False)
    evaluations: Evaluations = field(init=False)

    def __post_init__(self, evaluation_sets: Mapping[str, Sequence[Sample]]) -> None:
        self.recovery = Recovery(self.settings.training, self.settings.optimizer)
        self._attempts = Attempts(self.saver.owner)
        self.saver.on_saved = self._attempts.saved
        shortest = min(evaluation_sets["target"], key=lambda sample: sample.num_tokens)
        self._identity: Mapping[str, str] = {}
        self.evaluations = Evaluations(
            evaluation_sets,
            self.engine.capture,
            self._pad_id,
            self.settings.evaluation.every_steps,
            self.recovery,
            self.metrics,
            self.watchers,
            self.stopped,
        )
        self._steps = Steps(self.engine, self._pad_id, shortest, self.accuse, self._attempts)

    def begin(self) -> None:
        """Evaluate, make the first checkpoint, if there is none, so that there is something to go back to, and read.

        It is made before anything is read: what a killed run leaves of it, letters and draws, is then made again. A run
        whose first evaluation fails leaves no checkpoint, so that another model may be named. Raises TrainingError if
        that fails, or if the model is not sound, FencedError if another trainer has taken over.
        """
        self.saver.begin(self.step)
        self.evaluate()
        self._require_sound()
        if self.saver.saved is None:
            self.saver.save_or_retry(self.step, states_of(self._parts), durable=True)
            self.plan.begin(self.step, follow=False)
        else:
            self.plan.begin(self.step, follow=self.plan.strict or not self.changed)
        self.ingest.start(self.cursor.positions(), self._identity)

    def run(self) -> None:
        """Train until stopped, until `training.max_steps`, or until a finite stream ends; then checkpoint.

        Raises what the ingest thread failed with, after a last checkpoint of what was learned before; FencedError,
        without one, if another trainer has taken over; CheckpointError if checkpoints fail for too long, or at the end;
        TrainingError if the model is not finite and no checkpoint helps, or if a step fails that no sample is to blame
        for.
        """
        self._look_for_a_successor()
        self._attempts.begin(self.saver.saved)
        self._rest = Rest(self.metrics)
        expect_layers(self.metrics, self.engine)
        try:
            self._loop()
        except (SourceError, PoisonError):
            self._keep_what_was_learned()  # the stream failed between two steps
            raise
        except Exception:
            self.saver.wait()
            raise
        else:
            self._drain()
        finally:
            self._attempts.close()
            self.plan.file.close()
        if not self.stopped():
            self.evaluate()

    def _keep_what_was_learned(self) -> None:
        """Drain although something else failed, which is then the failure to report."""
        try:
            self._drain()
        except Exception as error:  # a full disk stops both; a device that failed cannot be read
            logger.error("no last checkpoint: %s", error)

    def _drain(self) -> None:
        self.enter(State.DRAINING)
        self.ingest.stop_reading()  # else a record could be dead-lettered after the snapshot, and again after a restart
        self.saver.settle()
        if self.saver.has_news(self.step) or self.saver.dead_letters.held:
            self.saver.save(self.step, self._sound_parts())

    def _loop(self) -> None:
        limit = self.settings.training.max_steps
        while not self.stopped() and (limit is None or self.step < limit):
            self.steering.obey(self)
            self.saver.look()
            asked = time.perf_counter()
            pool = self._next_pool()
            started = time.perf_counter()
            if not pool:
                self.metrics.phase_seconds.inc(started - asked, "wait")
            if not pool and (self.steering.called or self.saver.is_written):
                continue
            if not pool:
                if self.stopped() or not self.saver.is_due_while_idle(self.step):
                    return
                self.checkpoint()
                continue
            survived = self._step(pool, started - asked)
            if self.step % self.settings.evaluation.every_steps == 0:
                self.evaluate()
                why = self.evaluations.why_diverged(self.step)
                if why is not None:
                    self._roll_back(why)
            if survived or self.saver.is_due(self.step) or self.plan.saves_after(self.step):
                self.checkpoint(durable=survived)

    def checkpoint(self, *, durable: bool = False) -> None:
        """A model that is not sound goes back to the checkpoint before, and that is saved; or it is tried later.

        Unless it has to be `durable` at once, it may be written while training goes on. What is known of samples that
        kill processes is not to be forgotten before that.
        """
        self.saver.settle()
        parts = self._sound_parts()
        self.saver.save_or_retry(self.step, parts, durable=durable or self._attempts.suspects)

    def _sound_parts(self) -> dict[str, object]:
        """States for a checkpoint, after a rollback if the model is not sound: what is saved can be gone back to."""
        why = self._why_unsound()
        if why is not None:
            self._roll_back(why)
        self.recovery.saves()
        return states_of(self._parts)

    def _next_pool(self) -> list[Sample]:
        """Empty only when there is nothing left to do, or a checkpoint became due while none came."""
        if self.buffer.records + self.sampler.waiting == 0:
            self.enter(State.IDLE)
        try:
            pool = self.plan.next(self.sampler, self.step + 1, self.saver.newest, self._is_interrupted)
        except TrainingError:  # between two steps
            self._keep_what_was_learned()
            raise
        self.enter(State.CATCHING_UP if self.ingest.paused else State.TRAINING)
        return pool

    def _is_interrupted(self) -> bool:
        """Whether to wait no longer for samples. Raises FencedError as soon as it is known."""
        if time.monotonic() - self._owner_seen >= OWNER_LOOK_S:
            self._look_for_a_successor()
        called = self.steering.called or self.saver.is_written
        return self.stopped() or called or self.saver.is_due_while_idle(self.step)

    def rest(self) -> None:
        """What is due although no step is made, while paused."""
        self.last_progress = time.monotonic()
        self.saver.look()
        if self._is_interrupted() and self.saver.is_due_while_idle(self.step):
            self.checkpoint()

    def _look_for_a_successor(self) -> None:
        self._owner_seen = time.monotonic()
        with suppress(CheckpointError):  # the next checkpoint tells
            self.saver.owner.confirm()

    def _step(self, drawn: Sequence[Sample], waited: float) -> bool:
        """Make a step and decide its records. Returns whether it got past a sample that killed earlier processes."""
        started = time.perf_counter()
        rates, scores = self.recovery.rates, self.sampler.scores
        known, rival = self.plan.killers(self.step + 1), self.paying.rival if scores else None
        shadow = None if self.paying.rests and not scores else self.paying.shadow(self.sampler)
        made, survived = self._steps.make(drawn, self.step + 1, rates, known, scores=scores, rival=rival, shadow=shadow)
        if isinstance(made, Failure):
            logger.error("step %d failed\n%s", self.step + 1, made.trace)
            self._end_for(f"step {self.step + 1} failed, and no sample is to blame ({made.detail})")
        self.step += 1
        undrawn = self.sampler.feedback(self.plan.made(self.step, made.whole, self.recovery.factor))
        self.paying.turn(scored=scores)
        self._resolve(made, undrawn)
        self._observe(made, undrawn, waited, time.perf_counter() - started)
        if self.recovery.gives_up:
            self._end_for(f"step {self.step} and those before it failed on every sample ({self.recovery.trouble})")
        why = self.recovery.dead_steps or (self._why_unsound() if self.recovery.is_doubtful else None)
        if why is not None:
            self._roll_back(why)
        return survived

    def _end_for(self, why: str) -> NoReturn:
        """End the run, for steps fail that should not; what was learned before is whole, and is kept."""
        self.recovery.failed = 0  # the next run tries as often
        self._keep_what_was_learned()
        raise TrainingError(
            f"{why}; correct the model or selection.weigh={self.settings.selection.weigh}, or let a step take less "
            "memory: lower selection.micro_tokens or selection.pool_size"
        )

    def _require_sound(self) -> None:
        """Raise TrainingError if what training would go on from is not sound."""
        why = self._why_unsound()
        if why is not None:
            named = self.settings.checkpoint.dir
            raise TrainingError(
                f"checkpoint.dir={named}: {why} at step {self.step}, before any update; delete the newest checkpoint "
                "there to go on from the one before, or name another model.name"
            )

    def _why_unsound(self) -> str | None:
        target = collate(self.evaluations.sets["target"][:CONTROL_SAMPLES], self._pad_id)
        why = why_unsound(self.engine.capture, self.optimizer, target, self.evaluations.world)
        return why or self.evaluations.why_diverged(self.step)

    def _roll_back(self, why: str) -> None:
        """Go back to the last checkpoint's weights and state, and on from here: no record is read again.

        Raises TrainingError if that did not help before, and CheckpointError if there is none to go back to.
        """
        self.saver.settle()
        self.recovery.roll_back(why)
        checkpoint = load_latest(self.settings.checkpoint.dir)
        if checkpoint is None:
            raise CheckpointError(f"checkpoint.dir={self.settings.checkpoint.dir} is empty, and {why}; start again")
        state = restore(checkpoint, self.loaded, self.optimizer)
        load_states({"engine": self.engine, "sampler": self.sampler, "paying": self.paying}, state.parts)
        discarded = self.cursor.discard(state.cursor["counts"])
        self.metrics.rollbacks.inc()
        rate = self.recovery.rates.learning_rate
        self.recovery.trouble = f"step {self.step}: {why}; went back to step {state.step}, learning rate {rate:g}"
        steps = self.step - state.step
        logger.error("%s; %d steps are taken back, %d records discarded", self.recovery.trouble, steps, discarded)
        self.watchers.event(self.step, "rollback", self.recovery.trouble)
        self.recovery.best_loss = self._best_loss(state)
        self.evaluations.forget()
        self._require_sound()

    def _resolve(self, made: Made, undrawn: Sequence[Sample]) -> None:
        coefficients = () if made.report is None else made.report.coefficients
        for sample, given in zip_longest((*made.pool, *undrawn), coefficients):
            outcome = Outcome.TRAINED if given is not None and given > 0 else Outcome.NOT_SELECTED
            at = sample.partition, sample.offset
            self.cursor.resolve(*at, outcome, id=sample.id, step=self.step, coefficient=given)

    @property
    def _pad_id(self) -> int:
        return int(self.loaded.tokenizer.pad_token_id)

    @property
    def _parts(self) -> dict[str, object]:
        """Whatever has state beside model, optimizer and cursor, by the name it has in a checkpoint.

        The ingest thread's parts change while a checkpoint is made: a snapshot holds their state.
        """
        return {"engine": self.engine, "sampler": self.sampler, "paying": self.paying, "recovery": self.recovery}

    def accuse(self, sample: Sample, failure: Failure) -> None:
        """Dead-letter a sample that steps fail on."""
        record = sample.record or Record(sample.partition, sample.offset, sample.offset + 1, None)
        self.ingest.dead_letter(DeadLetter(record, failure.reason, failure.detail))
        self.plan.accuse(sample, failure)
        why = f"{sample.partition} offset {sample.offset} is dead-lettered as {failure.reason}: {failure.detail}"
        self.recovery.trouble = why
        logger.warning("%s", why)
        self.watchers.event(self.step, "accused", why)

    def enter(self, state: State) -> None:
        """Go to a state, and count that as progress."""
        self.state = state
        self.last_progress = time.monotonic()
        self.metrics.state.state(state.value)

    def evaluate(self) -> None:
        """Measure the loss of every evaluation set. Raises TrainingError if the first of a run fails."""
        self.evaluations.evaluate(self.step)

    def restore(self, state: TrainerState) -> None:
        """Take up where a checkpoint left off; model, optimizer and cursor are restored elsewhere.

        A part that is on now and was off then begins afresh. Raises CheckpointError if a part's state does not fit.
        """
        self.step = self.saver.saved = state.step
        self._identity = state.source_identity
        try:
            load_states({**self._parts, **self.ingest.parts}, state.parts)
        except (ValueError, KeyError) as error:  # a name that is missing is that of another selector's state
            raise CheckpointError(
                f"the state of the selection does not fit ({error}); restore the settings it was made with, "
                "or set another checkpoint.dir"
            ) from error
        self.recovery.best_loss = self._best_loss(state)
        if self.recovery.best_loss is None:
            self.recovery.first_losses.clear()

    def _best_loss(self, state: TrainerState) -> float | None:
        """The lowest target loss that a checkpoint knows of, unless it is that of other samples or another model."""
        anew = {"target", "samples", "model"} & {name.partition(".")[0] for name in self.changed}
        known: float | None = state.parts.get("recovery", {}).get("best_loss")
        return None if anew else known

    def _observe(self, made: Made, undrawn: Sequence[Sample], waited: float, seconds: float) -> None:
        self.last_progress = time.monotonic()
        self.recovery.note(made.whole.result, target_refused=made.whole.target_refused)
        self.metrics.steps_without_update.set(self.recovery.idle)
        pool, report = made.pool, made.report
        if report is None:
            self.metrics.steps.inc(1, made.whole.result)
            return
        self.last_report, self.last_undrawn = report, undrawn
        observe_step(self.metrics, pool, undrawn, report, waited, seconds)
        self._rest.note()
        if self.settings.selection.mask != "none":
            self.metrics.mask_density.set(self.optimizer.density)
        observe_stages(self.metrics, self.engine, self.sampler, report)
        note_advantage(self.paying, self.sampler, made.whole, self.step, self.metrics, self.watchers)
        loss = sum(report.losses) / len(report.losses)
        logger.debug("step %d: %s, pool loss %.4f, selected %s", self.step, report.result, loss, report.selected)
        self.watchers.step(self.step, pool, report)
