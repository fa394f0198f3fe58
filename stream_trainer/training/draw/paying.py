"""Does selection pay, here and now? And training without it while it does not."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from gradient_selectors.draw.learned import Role
from gradient_selectors.draw.uniform import draw_uniform
from gradient_selectors.views.advantage import Comparison

from stream_trainer.records import Sample
from stream_trainer.settings.sections.advantage import AdvantageSettings
from stream_trainer.training.draw.pools import PoolSampler
from stream_trainer.training.draw.shadow import Effect, Shadow
from stream_trainer.training.draw.sides import Sides
from stream_trainer.training.draw.waiting import LearnedSampler
from stream_trainer.training.step import StepReport

AGAIN = 1.1  # times `pays_from`: from here on selection pays again, so that nothing flickers


@dataclass
class Shadows:
    """Measured effects of steps and of uniform draws, every `every` steps.

    Attributes:
        held: samples of the target that steer nothing.
        generator: draws the uniform side, on the CPU.
        micro_tokens: bound on the tokens of a pass.
        measured: what the effects come to.
        predicted: what the same effects were to first order.
    """

    every: int
    held: Sequence[Sample]
    generator: torch.Generator
    micro_tokens: int | None
    measured: Sides
    predicted: Sides
    disagree: bool = field(default=False, init=False)
    _turns: int = field(default=0, init=False)

    @property
    def due(self) -> bool:
        """Whether the next step is measured."""
        return self._turns % self.every == 0

    def turn(self) -> None:
        """Take note of a step."""
        self._turns += 1

    def note(self, chosen: Effect, uniform: Effect) -> bool:
        """Take note of effects. Returns whether what is measured begins to speak against what is predicted."""
        self.measured.note(chosen.measured, uniform.measured)
        self.predicted.note(chosen.predicted, uniform.predicted)
        before, self.disagree = self.disagree, self.measured.direction * self.predicted.direction < 0
        return self.disagree and not before

    def state_dict(self) -> dict[str, Any]:
        """All that the future depends on."""
        return {
            "measured": self.measured.state_dict(),
            "predicted": self.predicted.state_dict(),
            "disagree": self.disagree,
            "turns": self._turns,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.measured.load_state_dict(state["measured"])
        self.predicted.load_state_dict(state["predicted"])
        self.disagree, self._turns = state["disagree"], state["turns"]
        self.generator.set_state(state["generator"])


@dataclass
class Paying:
    """What comparisons of selection with chance have come to, newer ones counting more.

    Attributes:
        generator: draws the uniform side, on the CPU.
        shadows: measures effects, if that is asked for.
        predicted: what updates are worth to first order.
        agreement: how steady the target's gradient is: 1 without noise, 0 of noise alone; None before it is known.
        pays: whether selection pays; None before it is known.
    """

    settings: AdvantageSettings
    generator: torch.Generator
    shadows: Shadows | None = None
    predicted: Sides = field(init=False)
    agreement: float | None = field(default=None, init=False)
    pays: bool | None = field(default=None, init=False)
    _scored: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.predicted = Sides(self.settings.window)

    @property
    def measured_advantage(self) -> float | None:
        """What an update is worth, in uniform ones, as measured; None before it is known."""
        return None if self.shadows is None else self.shadows.measured.advantage

    @property
    def advantage(self) -> float | None:
        """What decides: the measured advantage where it is known, else the predicted one."""
        measured = self.measured_advantage
        return self.predicted.advantage if measured is None else measured

    @property
    def rests(self) -> bool:
        """Whether to train without selection."""
        return self.pays is False and self.settings.when_not_paying == "uniform"

    @property
    def due(self) -> bool:
        """Whether the next scored step compares."""
        every = self.settings.every_steps
        return every is not None and self._scored % every == 0

    @property
    def looks(self) -> bool:
        """Whether the next step is to be one of selection even while that does not pay."""
        return self.due or (self.shadows is not None and self.shadows.due)

    @property
    def rival(self) -> torch.Generator | None:
        """What draws the uniform side of the next scored step; None if that is not to compare."""
        return self.generator if self.due else None

    def shadow(self, sampler: PoolSampler) -> Shadow | None:
        """What the effect of the step on what was drawn is measured beside; None if it is not to be."""
        shadows = self.shadows
        if shadows is None or not shadows.due:
            return None
        return Shadow(shadows.held, sampler.offered, shadows.generator, shadows.micro_tokens)

    def turn(self, *, scored: bool) -> None:
        """Take note of a step; one that would have been scored counts as one that was."""
        self._scored += int(scored or self.rests)
        if self.shadows is not None:
            self.shadows.turn()

    def note(self, found: Comparison) -> bool:
        """Take note of what both sides of a step are worth. Returns whether selection begins or ceases to pay."""
        self.predicted.note(found.chosen, found.uniform)
        if found.agreement is not None:
            known, keep = found.agreement if self.agreement is None else self.agreement, self.predicted.keep
            self.agreement = keep * known + (1 - keep) * found.agreement
        return self.judge()

    def judge(self) -> bool:
        """Whether selection begins or ceases to pay; that it pays from the start is no news."""
        advantage, before = self.advantage, self.pays
        if advantage is None:
            return False
        self.pays = advantage >= self.settings.pays_from * (AGAIN if before is False else 1.0)
        return self.pays != before and (before is not None or not self.pays)

    def state_dict(self) -> dict[str, Any]:
        """All that the future depends on."""
        state = self.predicted.state_dict()
        shadows = {} if self.shadows is None else {"shadows": self.shadows.state_dict()}
        return {
            "sums": state["sums"],
            "agreement": self.agreement,
            "counts": [state["comparisons"], self._scored],
            "pays": self.pays,
            "generator": self.generator.get_state(),
        } | shadows

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`. Shadows that were off when it was made begin afresh."""
        comparisons, self._scored = state["counts"]
        self.predicted.load_state_dict({"sums": state["sums"], "comparisons": comparisons})
        self.agreement, self.pays = state["agreement"], state["pays"]
        self.generator.set_state(state["generator"])
        if self.shadows is not None and "shadows" in state:
            self.shadows.load_state_dict(state["shadows"])


def comparison_of(sampler: PoolSampler, report: StepReport) -> Comparison | None:
    """What a step tells of both sides; None if nothing."""
    if isinstance(sampler, LearnedSampler) and report.utilities is not None:
        return by_roles(sampler.learned.roles, report.utilities)
    return report.comparison


def by_roles(roles: Sequence[Role], utilities: Sequence[float]) -> Comparison | None:
    """What the samples of a probe are worth that the policy drew, and those that chance drew: mean utilities.

    Both were drawn before any gradient was known. None if there is none of a kind.
    """
    sides = [
        [utility for role, utility in zip(roles, utilities, strict=True) if role == kind and math.isfinite(utility)]
        for kind in ("policy", "uniform")
    ]
    if not all(sides):
        return None
    policy, uniform = (sum(side) / len(side) for side in sides)
    return Comparison(policy, uniform, None)


@dataclass
class RestingSampler:
    """Another sampler's pools; while selection does not pay, `batch_size` samples of each, drawn uniformly, unscored.

    Attributes:
        generator: draws these, on the CPU.
    """

    inner: PoolSampler
    paying: Paying
    batch_size: int
    generator: torch.Generator
    scores: bool = field(default=True, init=False)
    _left: list[Sample] = field(default_factory=list, init=False)

    @property
    def waiting(self) -> int:
        return self.inner.waiting

    @property
    def offered(self) -> Sequence[Sample]:
        return self.inner.offered

    def next(self, stopped: Callable[[], bool]) -> list[Sample]:
        pool = self.inner.next(stopped)
        self.scores = not self.paying.rests or self.paying.looks
        if self.scores:
            return pool
        drawn = draw_uniform(len(pool), self.batch_size, self.generator)
        self._left = [sample for i, sample in enumerate(pool) if i not in set(drawn)]
        return [pool[i] for i in drawn]

    def feedback(self, report: StepReport) -> list[Sample]:
        left, self._left = self._left, []
        return [*left, *self.inner.feedback(report)]

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "resting": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing of another sampler's: without a fallback there was no such state."""
        if "resting" in state:
            self.inner.load_state_dict(state["inner"])
            self.generator.set_state(state["resting"])
