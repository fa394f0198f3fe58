"""What went wrong lately, and what follows from it: when to go back to the last checkpoint, and when to give up."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stream_trainer.errors import TrainingError
from stream_trainer.settings.schema import OptimizerSettings, TrainingSettings
from stream_trainer.training.step import APPLIED, SKIPPED_FAILED, SKIPPED_NONFINITE

MAX_ROLLBACKS = 3  # without a checkpoint of anything new between them
MAX_FAILED_STEPS = 3  # in a row, none of whose samples could be used
ADVISE_AFTER = 50  # steps in a row that change nothing

logger = logging.getLogger(__name__)


@dataclass
class Recovery:
    """Counts that a checkpoint keeps: a run that is resumed goes back, and gives up, when it would have.

    Attributes:
        dead: steps in a row that were not finite.
        failed: steps in a row none of whose samples could be used.
        idle: steps in a row that changed no weight.
        rollbacks: those since the last checkpoint that held a new update.
        factor: what rollbacks have made of the learning rate.
        updated: whether there was an update since the last rollback.
        best_loss: lowest loss on the target set that an evaluation in its turn has found; None before there is one.
        first_losses: the loss of each evaluation set when it was first measured.
        trouble: what went wrong last, for people; empty once something new was saved after it.
    """

    training: TrainingSettings
    optimizer: OptimizerSettings
    dead: int = field(default=0, init=False)
    failed: int = field(default=0, init=False)
    idle: int = field(default=0, init=False)
    rollbacks: int = field(default=0, init=False)
    factor: float = field(default=1.0, init=False)
    updated: bool = field(default=False, init=False)
    best_loss: float | None = field(default=None, init=False)
    first_losses: dict[str, float] = field(default_factory=dict, init=False)
    trouble: str = field(default="", init=False)

    @property
    def rates(self) -> OptimizerSettings:
        """The optimizer's settings, with the learning rate that rollbacks have left."""
        if self.factor == 1:
            return self.optimizer
        return self.optimizer.model_copy(update={"learning_rate": self.optimizer.learning_rate * self.factor})

    @property
    def dead_steps(self) -> str | None:
        """What to say when so many steps were not finite that it is time to go back; None before."""
        return f"{self.dead} steps in a row were not finite" if self.dead >= self.training.max_dead_steps else None

    @property
    def is_doubtful(self) -> bool:
        """Whether as many steps again have changed nothing, so that it is time to look whether the model is alive."""
        return self.idle > 0 and self.idle % self.training.max_dead_steps == 0

    @property
    def gives_up(self) -> bool:
        """Whether so many steps failed on all of their samples that it cannot be the samples."""
        return self.failed >= MAX_FAILED_STEPS

    def note(self, result: str, *, target_refused: bool = False) -> None:
        """Take note of a step, and advise where nothing has come of many."""
        if target_refused:
            self.trouble = "a refresh of the target's gradient was not finite; the gradient before it steers on"
        self.dead = self.dead + 1 if result == SKIPPED_NONFINITE else 0
        self.failed = self.failed + 1 if result == SKIPPED_FAILED else 0
        self.idle = 0 if result == APPLIED else self.idle + 1
        self.updated |= result == APPLIED
        if self.idle == ADVISE_AFTER:
            logger.warning(
                "%d steps in a row changed no weight, and their records are used up (the last was %s); if no candidate "
                "helps, look at target.path, or set selection.when_none_helps to uniform",
                self.idle,
                result,
            )

    def note_loss(self, loss: float) -> None:
        """Take note of an evaluation of the target set."""
        if math.isfinite(loss):
            self.best_loss = loss if self.best_loss is None else min(loss, self.best_loss)

    @property
    def watches_loss(self) -> bool:
        """Whether a loss on the target set can be too high."""
        return self.training.max_loss_rise is not None and self.best_loss is not None

    def why_diverged(self, loss: float | None) -> str | None:
        """What to say of a loss on the target set that is too high; None of others, and of one that is not known."""
        rise, best = self.training.max_loss_rise, self.best_loss
        if loss is None or rise is None or best is None or loss <= best + rise:
            return None
        return f"the target loss {loss:.3g} is more than training.max_loss_rise={rise:g} above the lowest, {best:.3g}"

    def roll_back(self, why: str) -> None:
        """Take note that the run goes back. Raises TrainingError if that has not helped before."""
        if self.rollbacks >= MAX_ROLLBACKS:
            raise TrainingError(
                f"optimizer.learning_rate={self.optimizer.learning_rate:g} (now {self.rates.learning_rate:g}): {why}, "
                f"and {self.rollbacks} rollbacks did not help; lower optimizer.learning_rate and start again, the "
                "records since the last checkpoint are read again"
            )
        self.rollbacks += 1
        self.factor *= self.training.rollback_learning_rate_factor
        self.dead, self.updated = 0, False

    def saves(self) -> None:
        """Take note that a sound model is being saved. If it holds anything new, what went wrong before is over."""
        if self.updated:
            self.rollbacks, self.trouble = 0, ""

    def state_dict(self) -> dict[str, Any]:
        """The counts, and the learning rate that the factor is of."""
        return {
            "counts": [self.dead, self.failed, self.idle, self.rollbacks],
            "factor": self.factor,
            "of": self.optimizer.learning_rate,
            "updated": self.updated,
            "best_loss": self.best_loss,
            "first_losses": dict(self.first_losses),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`. The factor was found for one learning rate, and ends with it."""
        self.dead, self.failed, self.idle, self.rollbacks = state["counts"]
        self.updated = state["updated"]
        self.best_loss = state.get("best_loss")  # older checkpoints have none
        self.first_losses = dict(state.get("first_losses", {}))
        self.factor = state["factor"] if state["of"] == self.optimizer.learning_rate else 1.0
