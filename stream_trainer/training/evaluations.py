"""The losses of the fixed sets, and whether that of the target tells that the model has become worse."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gradient_selectors import GradientCapture
from gradient_selectors.target import mean_loss
from gradient_selectors.world.base import Alone, World

from stream_trainer.errors import TrainingError
from stream_trainer.models.refusals import first_line
from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.records import Sample
from stream_trainer.samples.collate import collate
from stream_trainer.training.faults.moved import Moved, MovedShare
from stream_trainer.training.faults.recovery import Recovery
from stream_trainer.training.watchers import Watchers

logger = logging.getLogger(__name__)


@dataclass
class Evaluations:
    """Measures the sets, and keeps what was measured last.

    Attributes:
        sets: fixed samples by name; `target` is one of them.
        every_steps: steps between evaluations.
        recovery: is told of the target's loss, and of an evaluation that fails.
        world: the processes that share the samples of a set.
        losses: the last loss of each set (nats per token), measured at step `at`.
        moved: what share of what is trained moved between the last two evaluations; None before there were two.
    """

    sets: Mapping[str, Sequence[Sample]]
    capture: GradientCapture
    pad_id: int
    every_steps: int
    recovery: Recovery
    metrics: Metrics
    watchers: Watchers
    stopped: Callable[[], bool]
    world: World = field(default_factory=Alone)
    losses: dict[str, float] = field(default_factory=dict, init=False)
    at: int | None = field(default=None, init=False)
    moved: MovedShare | None = field(default=None, init=False)
    _target: tuple[int, float] | None = field(default=None, init=False)  # its loss, and the step it was measured at
    _looks: Moved = field(init=False)

    def __post_init__(self) -> None:
        self._looks = Moved(self.capture.parameters)

    def evaluate(self, step: int) -> None:
        """Measure the loss of every set, once a step.

        Raises TrainingError if the first of a run fails; a later one that fails leaves the losses as they were.
        """
        if self.at == step:
            return
        is_first, self.at = not self.losses, step
        self._look(step)
        began, fails = time.perf_counter(), False
        for name, samples in self.sets.items():
            if self.stopped():
                return
            try:
                self._measure(step, name, samples)
            except Exception as error:  # of the model, or of the device: out of memory, for one
                fails = True
                what = f"the loss of {name} cannot be measured ({type(error).__name__}: {first_line(error)})"
                if is_first:
                    raise TrainingError(f"{what}; lower evaluation.max_samples or target.max_samples") from error
                self.recovery.trouble = f"step {step}: {what}"
                logger.error("%s; training goes on", self.recovery.trouble)
                self.watchers.event(step, "evaluation_failed", self.recovery.trouble)
        self.metrics.degraded.labels("evaluation").set(fails)
        self.watchers.evaluation(step, self.losses, time.perf_counter() - began)

    def _look(self, step: int) -> None:
        began = time.perf_counter()
        self.moved = self._looks.look()
        if self.moved is not None:
            self.metrics.moved.tensors.set(self.moved.tensors)
            self.metrics.moved.weights.set(self.moved.weights)
            logger.debug("step %d: did not move since the last evaluation: %s", step, ", ".join(self.moved.still))
        self.metrics.phase_seconds.inc(time.perf_counter() - began, "evaluate")

    def why_diverged(self, step: int) -> str | None:
        """Why the model is worth less than an earlier one; None also if that cannot be measured."""
        if not self.recovery.watches_loss:
            return None
        if self._target is None or self._target[0] != step:
            try:
                self._measure(step, "target", self.sets["target"])
            except Exception as error:  # an evaluation that fails stops nothing
                logger.error("step %d: the loss of target cannot be measured (%s)", step, first_line(error))
                return None
        return self.recovery.why_diverged(self._target[1] if self._target else None)

    def forget(self) -> None:
        """What was measured was of weights that are no more."""
        self._target = self.at = None

    def replace_target(self, step: int, samples: Sequence[Sample], loss: float) -> None:
        """Watch another target, whose loss was measured; the lowest one was that of the target before."""
        self.sets = {**self.sets, "target": samples}
        self._target, self.recovery.best_loss = (step, loss), loss
        self.recovery.first_losses.pop("target", None)
        self._show("target", loss)

    def _show(self, name: str, loss: float) -> None:
        self.losses[name] = loss
        self.metrics.evaluation_loss.labels(name).set(loss)
        first = self.recovery.first_losses.setdefault(name, loss)
        self.metrics.forgetting.labels(name).set(loss / first if first > 0 else math.nan)
        self.metrics.evaluation_time.labels(name).set_to_current_time()

    def _measure(self, step: int, name: str, samples: Sequence[Sample]) -> None:
        started = time.perf_counter()
        with self.watchers.during(f"evaluating {name}", len(samples)) as advance:
            loss = mean_loss(self.capture, [collate(samples, self.pad_id)], advance, self.world)
        self._show(name, loss)
        if name == "target":
            self._target = step, loss
            # Not what a resume or a checkpoint measures beside: when these come is chance.
            if step % self.every_steps == 0 or self.recovery.best_loss is None:
                self.recovery.note_loss(loss)
        self.metrics.phase_seconds.inc(time.perf_counter() - started, "evaluate")
        logger.info("step %d: %s loss %.4f", step, name, loss)
