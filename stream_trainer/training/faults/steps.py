"""Make the trainer's steps, and give away the samples that they fail on, or that kill the process."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from gradient_selectors import SelectionEngine

from stream_trainer.records import Sample
from stream_trainer.samples.collate import collate
from stream_trainer.settings.schema import OptimizerSettings
from stream_trainer.training.draw.shadow import Shadow
from stream_trainer.training.faults.attempts import Attempts
from stream_trainer.training.faults.culprits import KILLED, Failure, Hands, Made, make_step
from stream_trainer.training.step import train_step

KILLER = Failure(KILLED, "two processes in a row were killed while they tried this sample")


@dataclass(frozen=True)
class Steps:
    """Steps of one engine.

    Attributes:
        control: a sample of the target set, known to be good.
        accuse: takes a sample that a step fails on out of the stream, for good.
    """

    engine: SelectionEngine
    pad_id: int
    control: Sample
    accuse: Callable[[Sample, Failure], None]
    attempts: Attempts

    def make(
        self,
        drawn: Sequence[Sample],
        step: int,
        rates: OptimizerSettings,
        known: Sequence[tuple[int, int]] = (),
        *,
        scores: bool,
        rival: torch.Generator | None = None,
        shadow: Shadow | None = None,
    ) -> tuple[Made | Failure, bool]:
        """Make a step, and whether it got past a sample that killed earlier processes.

        `known` are partition and offset of those that did when the step was first made.
        """
        hands = Hands(
            step=lambda pool: train_step(
                self.engine, pool, self.pad_id, rates, scores=scores, rival=rival, shadow=shadow
            ),
            rehearse=lambda pool: self.engine.rehearse(collate(pool, self.pad_id), scores=scores),
            accuse=self.accuse,
            scores=scores,
            control=[self.control],
        )
        survived = self._killers(drawn, step, hands) if self.attempts.enter(step) else []
        again = [i for i, sample in enumerate(drawn) if (sample.partition.number, sample.offset) in known]
        for i in set(again) - set(survived):
            hands.accuse(drawn[i], KILLER)
        made = make_step(drawn, hands, sorted({*again, *survived}))
        if isinstance(made, Made):
            self.attempts.leave(step)
        return made, bool(survived)

    def _killers(self, drawn: Sequence[Sample], step: int, hands: Hands) -> list[int]:
        """Give away what killed earlier processes in this step, and try each of the others with a note of it."""
        killers = [i for i, sample in enumerate(drawn) if self.attempts.has_killed(sample)]
        for i in killers:
            hands.accuse(drawn[i], KILLER)
        rest = [sample for i, sample in enumerate(drawn) if i not in killers]
        for sample in rest:
            self.attempts.trying(step, [sample])
            with suppress(Exception):  # what it raises, the step raises again
                hands.rehearse([sample])
        self.attempts.trying(step, rest)
        return killers
