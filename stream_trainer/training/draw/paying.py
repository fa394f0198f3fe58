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
from stream_trainer.settings.advantage import AdvantageSettings
from stream_trainer.training.draw.pools import PoolSampler
from stream_trainer.training.draw.waiting import LearnedSampler
from stream_trainer.training.step import StepReport

AGAIN = 1.1  # times `pays_from`: from here on selection pays again, so that nothing flickers
ERRORS = 2.0  # standard errors that both sides are given, so that noise makes them alike


@dataclass
class Paying:
    """What comparisons of selection with chance have come to, newer ones counting more.

    Attributes:
        generator: draws the uniform side, on the CPU.
        comparisons: how many there were.
        agreement: how steady the target's gradient is: 1 without noise, 0 of noise alone; None before it is known.
        pays: whether selection pays; None before it is known.
    """

    settings: AdvantageSettings
    generator: torch.Generator
    comparisons: int = field(default=0, init=False)
    agreement: float | None = field(default=None, init=False)
    pays: bool | None = field(default=None, init=False)
    _scored: int = field(default=0, init=False)
    _sums: list[float] = field(default_factory=lambda: [0.0] * 5, init=False)

    @property
    def advantage(self) -> float | None:
        """What an update is worth, in uniform ones; None before it is known.

        A ratio of discounted sums, for what chance draws at one step may be worth nothing. Both have two standard
        errors of their difference added: where noise is all there is, the ratio is near 1.
        """
        if self.comparisons < self.settings.window:
            return None
        chosen, uniform, weights_2, differences, squares = self._sums
        total = (1 - self._keep**self.comparisons) / (1 - self._keep)  # of the discounts
        mean = (chosen - uniform) / total
        error = math.sqrt(max(0.0, squares - 2 * mean * differences + mean**2 * weights_2))
        below = max(0.0, uniform) + ERRORS * error
        return (max(0.0, chosen) + ERRORS * error) / below if below > 0 else 1.0

    @property
    def _keep(self) -> float:
        return 1 - 1 / self.settings.window

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
    def rival(self) -> torch.Generator | None:
        """What draws the uniform side of the next scored step; None if that is not to compare."""
        return self.generator if self.due else None

    def turn(self, *, scored: bool) -> None:
        """Take note of a step; one that would have been scored counts as one that was."""
        self._scored += int(scored or self.rests)

    def note(self, found: Comparison) -> bool:
        """Take note of what both sides of a step are worth. Returns whether selection begins or ceases to pay."""
        keep, difference = self._keep, found.chosen - found.uniform
        old = (keep, keep, keep**2, keep**2, keep**2)
        new = (found.chosen, found.uniform, 1.0, difference, difference**2)
        self._sums = [share * was + more for share, was, more in zip(old, self._sums, new, strict=True)]
        if found.agreement is not None:
            known = found.agreement if self.agreement is None else self.agreement
            self.agreement = keep * known + (1 - keep) * found.agreement
        self.comparisons += 1
        return self._judge()

    def _judge(self) -> bool:
        """Whether selection begins or ceases to pay; that it pays from the start is no news."""
        advantage, before = self.advantage, self.pays
        if advantage is None:
            return False
        self.pays = advantage >= self.settings.pays_from * (AGAIN if before is False else 1.0)
        return self.pays != before and (before is not None or not self.pays)

    def state_dict(self) -> dict[str, Any]:
        """All that the future depends on."""
        return {
            "sums": list(self._sums),
            "agreement": self.agreement,
            "counts": [self.comparisons, self._scored],
            "pays": self.pays,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._sums, self.agreement = list(state["sums"]), state["agreement"]
        self.comparisons, self._scored = state["counts"]
        self.pays = state["pays"]
        self.generator.set_state(state["generator"])


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

    def next(self, stopped: Callable[[], bool]) -> list[Sample]:
        pool = self.inner.next(stopped)
        self.scores = not self.paying.rests or self.paying.due
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
