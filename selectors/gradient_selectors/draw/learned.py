"""The learned draw: a predictor of utility over cheap features draws, and gradients teach it.

Most steps are plain training steps on what is drawn. Now and then a probe gives gradients to what is drawn and to some
that explore, and the predictor learns from all of them. The loss, which every step knows for all it trains on, tells in
which producers' records answers belong to their prompts.

Shape suffixes: M samples waiting, n drawn, d columns.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gradient_selectors.draw.predictor import Predictor, Standardiser
from gradient_selectors.draw.stream_draw import Found, StreamDraw
from gradient_selectors.features.columns import NEAR_COPY, ColumnTable
from gradient_selectors.features.traits import Traits

Role = Literal["policy", "uncertainty", "rival", "uniform"]

CONFIDENT, EXPLORING = 0.25, 2.0  # times the deviation of theta: in slots of the policy, and of uncertainty
SAME = 0.95  # correlation of what waits, predicted before and after a probe, from which on it found no news
LONGER = 3  # times as many steps to the next probe as to this one
# Times as sure that utilities tell nothing of quality: within a subject they put clean samples above spoiled ones with
# an AUC of 0.6 to 0.7, and losses with 0.9, but a few of them would outweigh what many losses say.
SLOWLY = 2.0
TINY = 1e-9


@dataclass(frozen=True)
class LearnedOptions:
    """Settings of `LearnedDraw`.

    Attributes:
        batch_size: samples that a step trains on.
        probe_size: samples that a probe scores.
        first_probe: steps before the first probe.
        probe_every: steps between probes; up to `max_probe_every` while probes hardly change what is drawn.
        discount: what is left of an observation's weight after a probe.
        precision: observations that the prior counts as.
        temperature: of the softmax by which slots are filled, in standard deviations of what is predicted.
        loss_weight: how much the loss counts beside utility.
        loss_observation: what a loss that was seen in a plain step counts beside one of a probe.
    """

    batch_size: int = 4
    probe_size: int = 6
    first_probe: int = 8
    probe_every: int = 8
    max_probe_every: int = 64
    discount: float = 0.985
    precision: float = 16.0
    temperature: float = 0.25
    loss_weight: float = 1.0
    loss_observation: float = 0.5


class LearnedDraw:
    """Draws what a Bayesian linear predictor thinks useful, by Thompson sampling.

    Examples:
        >>> from gradient_selectors.features.columns import Columns, ColumnTable
        >>> from gradient_selectors.draw.learned import LearnedDraw, LearnedOptions
        >>> from gradient_selectors.draw.stream_draw import Found
        >>> from gradient_selectors.features.traits import Traits
        >>> import numpy as np
        >>> def sample(seed: int) -> Traits:
        ...     generator = np.random.default_rng(seed)
        ...     return Traits(generator.integers(0, 50, 20), torch.from_numpy(generator.normal(size=4)).float())
        >>> options = LearnedOptions(batch_size=2, probe_size=4, first_probe=0)
        >>> draw = LearnedDraw(options, ColumnTable(Columns(), [sample(0)]), seed=0)
        >>> waiting = [sample(seed) for seed in range(1, 33)]
        >>> draw.probes, draw.count
        (True, 4)
        >>> drawn = draw.draw(waiting, draw.count)
        >>> utilities_n, losses_n = torch.tensor([0.9, 0.1, 0.2, 0.1]), torch.tensor([2.0, 2.5, 2.4, 2.2])
        >>> draw.observe(Found(losses_n, coefficients_n=torch.tensor([0.5, 0.0, 0.5, 0.0]), utilities_n=utilities_n))
        >>> draw.learn([waiting[i] for i in drawn])  # these have left

    A step is `draw`, then `observe` with what the step found, then `learn` with what has left.

    Utility and loss have a predictor each, for the loss is seen far more often. Rewards are in units of their own
    discounted spread. The loss counts in the columns that tell good producers from bad ones only: elsewhere a low loss
    marks an easy subject, or what the model knows already.

    Each slot of a step is filled with its own draw of the coefficients and its own noise, and never with a near copy of
    what fills another: what is trained on is alike in what is useful, and different otherwise. Of a probe's further
    samples, half are drawn with inflated uncertainty, or by a rival if there is one, half uniformly.

    Attributes:
        table: the features.
        utility, merit: predictors of the utility and of the loss, turned round.
        roles: why each of the samples drawn last was drawn.
    """

    def __init__(self, options: LearnedOptions, table: ColumnTable, seed: int, rival: StreamDraw | None = None) -> None:
        """`rival`: another way to draw, whose samples probes compare with."""
        self._options, self.table, self._rival = options, table, rival
        self.roles: tuple[Role, ...] = ()
        self._generator = torch.Generator().manual_seed(seed)
        prior_d, precision_d = table.prior_d, options.precision * table.certainty_d
        slowly_d = 1 + (SLOWLY - 1) * table.judges_quality_d
        self.utility = Predictor(prior_d, slowly_d * precision_d, options.discount)
        self.merit = Predictor(torch.zeros_like(prior_d), precision_d, options.discount)
        self._utilities, self._losses = Standardiser(options.discount), Standardiser(options.discount)
        self._explained = torch.zeros(2, dtype=torch.float64)  # squares of rewards, and of what was not predicted
        self._steps_to_probe, self._interval = options.first_probe, options.probe_every
        self._drawn: list[Traits] = []
        self._drawn_nd = self._waiting_Md = torch.empty(0, len(prior_d), dtype=torch.float64)

    @property
    def probes(self) -> bool:
        """Whether the next step, or the one that was just drawn for, is a probe."""
        return self._steps_to_probe == 0

    @property
    def scores(self) -> bool:
        """The same: only probes are scored."""
        return self.probes

    @property
    def discount(self) -> float:
        """What is left of an observation's weight after a probe."""
        return self._options.discount

    @property
    def count(self) -> int:
        """Samples that the next step needs."""
        return self._options.probe_size if self.probes else self._options.batch_size

    @property
    def interval(self) -> int:
        """Steps that will lie between the next probe and the one after it."""
        return self._interval

    @property
    def explained(self) -> float:
        """Share of the rewards' variance in late probes that was predicted; 0 before the first."""
        squares, errors = self._explained.tolist()
        return max(0.0, 1 - errors / squares) if squares > 0 else 0.0

    @property
    def utility_deviation(self) -> float:
        """By how much single samples' utilities differ; not a number before any is known."""
        return float(self._utilities.deviation)

    @property
    def coefficients_d(self) -> Tensor:
        """What one unit of each column is thought to add to a sample's worth, (d,) float64."""
        return self.utility.mean_d + self._loss_weights_d * self.merit.mean_d

    @property
    def deviations_d(self) -> Tensor:
        """How uncertain each of them is, (d,) float64."""
        return (self.utility.deviations_d.square() + (self._loss_weights_d * self.merit.deviations_d).square()).sqrt()

    @property
    def _loss_weights_d(self) -> Tensor:
        return self._options.loss_weight * self.table.judges_quality_d

    def draw(self, waiting: Sequence[Traits], count: int) -> list[int]:
        """Up to `count` of those that wait, as indices in ascending order."""
        if not waiting:
            return []
        x_Md = self.table.matrix(waiting)
        count = min(count, len(waiting))
        by_policy = min(count, self._options.batch_size)
        by_uncertainty = 0 if self._rival else (count - by_policy) // 2
        worth_nM = torch.cat([self._worth(x_Md, by_policy, CONFIDENT), self._worth(x_Md, by_uncertainty, EXPLORING)])
        open_M = torch.ones(len(waiting), dtype=torch.bool)
        roles: dict[int, Role] = {}
        for slot, worth_M in enumerate(worth_nM):
            best = self._best(worth_M, open_M, list(roles), waiting)
            roles[best] = "policy" if slot < by_policy else "uncertainty"
            open_M[best] = False
        self._explore(waiting, count, roles)
        return self._take(waiting, x_Md, roles)

    def _explore(self, waiting: Sequence[Traits], count: int, roles: dict[int, Role]) -> None:
        """Fill the slots that are left: half by the rival, if there is one, the others uniformly."""
        rest = [i for i in range(len(waiting)) if i not in roles]
        missing = count - len(roles)
        if self._rival is not None:
            chosen = self._rival.draw([waiting[i] for i in rest], missing // 2)
            roles |= {rest[i]: "rival" for i in chosen}
            rest, missing = [i for i in rest if i not in roles], count - len(roles)
        uniform = torch.randperm(len(rest), generator=self._generator)[:missing].tolist()
        roles |= {rest[i]: "uniform" for i in uniform}

    def note(self, waiting: Sequence[Traits], drawn: Sequence[int]) -> None:
        """Somebody else has drawn these: what the step finds is learned from all the same."""
        self._take(waiting, self.table.matrix(waiting), dict.fromkeys(drawn, "policy"))

    def _take(self, waiting: Sequence[Traits], x_Md: Tensor, roles: Mapping[int, Role]) -> list[int]:
        drawn = sorted(roles)
        self.roles = tuple(roles[i] for i in drawn)
        self._drawn, self._drawn_nd, self._waiting_Md = [waiting[i] for i in drawn], x_Md[drawn], x_Md
        return drawn

    def _worth(self, x_Md: Tensor, count: int, inflation: float) -> Tensor:
        """What each slot thinks of each sample, (count, M), with the noise of a draw by softmax."""
        theta_nd = self.utility.sample(count, self._generator, inflation)
        theta_nd = theta_nd + self._loss_weights_d * self.merit.sample(count, self._generator, inflation)
        waits_nM = torch.empty(count, len(x_Md), dtype=torch.float64).exponential_(generator=self._generator)
        # Rewards are noisy, so coefficients are small: what counts is by how much one sample is better than others.
        spread = (x_Md @ self.coefficients_d).std(correction=0).clamp(min=TINY)
        return theta_nd @ x_Md.T / spread - self._options.temperature * waits_nM.log()

    def _best(self, worth_M: Tensor, open_M: Tensor, drawn: Sequence[int], waiting: Sequence[Traits]) -> int:
        """The best that is no near copy of what was drawn; the best of all if there is none."""
        order = torch.argsort(torch.where(open_M, worth_M, -math.inf), descending=True, stable=True)
        for i in order[: int(open_M.sum())].tolist():
            if not any(_near_copies(waiting[i], waiting[j]) for j in drawn):
                return int(i)
        return int(order[0])

    def observe(self, found: Found) -> None:
        """Learn from a step. What is not finite is left out."""
        scored = found.utilities_n is not None
        self._learn_merit(found.losses_n.detach().cpu().double(), 1.0 if scored else self._options.loss_observation)
        if found.utilities_n is not None:
            before_M = self._waiting_Md @ self.coefficients_d
            self._learn_utility(found.utilities_n.detach().cpu().double())
            if self.probes:
                self._steps_to_probe = self._interval
                self._lengthen(before_M)
        self._steps_to_probe = max(0, self._steps_to_probe - 1)
        self.table.trained([self._drawn[i] for i in found.trained])
        self._drawn = []

    def _lengthen(self, before_M: Tensor) -> None:
        """Wait three times as long for the next probe, up to the longest while probes hardly change what is drawn."""
        after_M = self._waiting_Md @ self.coefficients_d
        same = len(after_M) > 1 and float(torch.corrcoef(torch.stack([before_M, after_M]))[0, 1]) > SAME
        longest = self._options.max_probe_every if same else self._options.probe_every
        self._interval = min(self._interval * LONGER, longest)

    def _learn_merit(self, losses_n: Tensor, weight: float) -> None:
        usable_n = losses_n.isfinite()
        if bool(usable_n.any()):
            self.merit.observe(self._drawn_nd[usable_n], -self._losses(losses_n[usable_n]), weight)

    def _learn_utility(self, utilities_n: Tensor) -> None:
        usable_n = utilities_n.isfinite()
        if not bool(usable_n.any()):
            return
        x_nd, rewards_n = self._drawn_nd[usable_n], self._utilities(utilities_n[usable_n])
        errors_n = rewards_n - x_nd @ self.utility.mean_d
        found = torch.stack([rewards_n.square().sum(), errors_n.square().sum()])
        self._explained = self._options.discount * self._explained + found
        self.utility.observe(x_nd, rewards_n)

    def learn(self, gone: Sequence[Traits]) -> None:
        """Take note of the samples that have left, drawn or not."""
        self.table.learn(gone)

    def state_dict(self) -> dict[str, Any]:
        """All that the future depends on, beside the options, the columns and the target."""
        return {
            "table": self.table.state_dict(),
            "utility": self.utility.state_dict(),
            "merit": self.merit.state_dict(),
            "utilities": self._utilities.state_dict(),
            "losses": self._losses.state_dict(),
            "explained": self._explained.clone(),
            "generator": self._generator.get_state(),
            "schedule": [self._steps_to_probe, self._interval],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`. Raises ValueError if it is of other columns."""
        self.utility.load_state_dict(state["utility"])
        self.merit.load_state_dict(state["merit"])
        self.table.load_state_dict(state["table"])
        self._utilities.load_state_dict(state["utilities"])
        self._losses.load_state_dict(state["losses"])
        self._explained = state["explained"].clone()
        self._generator.set_state(state["generator"])
        self._steps_to_probe, self._interval = state["schedule"]


def _near_copies(first: Traits, second: Traits) -> bool:
    shared = len(set(first.shingles.tolist()) & set(second.shingles.tolist()))
    return shared > NEAR_COPY * min(len(first.shingles), len(second.shingles))
