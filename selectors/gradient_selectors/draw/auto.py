"""Which way of training makes the most progress in a second, on this stream, now: found out from what probes measure.

A probe holds samples that the learned draw, a rival without gradients, and chance have drawn, and knows the utility of
each. A way's progress is the utility of what it trains on: the mean over what it draws, and for a scored step that of
the weighted update.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from gradient_selectors.draw.learned import LearnedDraw
from gradient_selectors.draw.nearest import NearRandom
from gradient_selectors.draw.stream_draw import Found
from gradient_selectors.features.traits import Traits

Way = Literal["learned", "scored", "rival", "uniform"]
WAYS: tuple[Way, ...] = get_args(Way)
# Relative utilities that each way is thought to have before anything was measured, and the samples these count as.
PRIOR: Mapping[Way, float] = {"learned": 0.2, "scored": 0.2, "rival": 0.15, "uniform": 0.1}
PRIOR_SAMPLES = 2.0
ROLES: Mapping[str, Way] = {"policy": "learned", "rival": "rival", "uniform": "uniform"}
# Standard errors of their difference by which a way has to be better than the learned draw to be taken, and to stay.
# Utilities of single samples differ far more than the means of two ways do: what looked best after a few of them mostly
# was lucky, and has to go when more is known, while the learned draw costs little where it is no better. It begins with
# what the ways without gradients know, so that of these more is asked.
SURE: Mapping[Way, float] = {"learned": 1.5, "scored": 1.5, "rival": 2.5, "uniform": 2.5}
STAYS = 1.0
PAYS = 1.1  # times the rate of uniform: less is not worth it
CLEAR = 0.2  # such an error, as a share of the rate of uniform, is small enough to say that nothing pays
TIMED = 4  # steps of a kind whose time is measured


class AutoDraw:
    """Trains on what the learned draw, a rival or chance draws, or scores every pool: whatever pays most.

    The times of the first steps of each kind are measured, and kept: what is chosen later depends on the state and the
    samples alone, and a run that goes on from a checkpoint chooses as it would have.

    Attributes:
        learned: draws for probes, and learns from every step.
        way: the present one.
    """

    def __init__(self, learned: LearnedDraw, rival: NearRandom, pool_size: int, batch_size: int, seed: int) -> None:
        """`rival` is the one that `learned` compares with. `pool_size`: samples of a scored step."""
        self.learned, self._rival = learned, rival
        self._pool_size, self._batch_size = pool_size, batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self.way: Way = "learned"
        self._sums = {way: PRIOR_SAMPLES * PRIOR[way] for way in WAYS}
        self._counts = dict.fromkeys(WAYS, PRIOR_SAMPLES)
        self._seconds: dict[str, list[float]] = {"plain": [], "scored": []}

    @property
    def scores(self) -> bool:
        """Whether the next step, or the one that was just drawn for, is scored."""
        return self.learned.probes or self.way == "scored"

    @property
    def count(self) -> int:
        """Samples that the next step needs."""
        return self._pool_size if self.scores else self._batch_size

    @property
    def rates(self) -> dict[Way, float]:
        """Progress of each way in the time of a plain step; not below 0."""
        return {way: self._rate(way) for way in WAYS}

    def _rate(self, way: Way) -> float:
        return max(0.0, self._sums[way] / self._counts[way]) / self._cost(way)

    def _cost(self, way: Way) -> float:
        """Time of a step in that of a plain one."""
        if way != "scored":
            return 1.0
        plain, scored = (_middle(self._seconds[kind]) for kind in ("plain", "scored"))
        return scored / plain if plain and scored else 3.0

    def draw(self, waiting: Sequence[Traits], count: int) -> list[int]:
        """Up to `count` of those that wait, as indices in ascending order."""
        if self.scores or self.way == "learned" or not waiting:
            return self.learned.draw(waiting, count)
        if self.way == "rival":
            drawn = self._rival.draw(waiting, count)
        else:
            drawn = sorted(torch.randperm(len(waiting), generator=self._generator)[:count].tolist())
        self.learned.note(waiting, drawn)
        return drawn

    def observe(self, found: Found) -> None:
        """Learn from a step, and after a probe choose the way that pays most."""
        scored, probed, roles = found.utilities_n is not None, self.learned.probes, self.learned.roles
        times = self._seconds["scored" if scored else "plain"]
        if len(times) < TIMED:
            times.append(found.seconds)
        self.learned.observe(found)
        if found.utilities_n is not None and probed:
            self._measure(found, roles)
            self._choose()

    def _measure(self, found: Found, roles: Sequence[str]) -> None:
        assert found.utilities_n is not None
        utilities = found.utilities_n.double().tolist()
        weights = found.coefficients_n.double().tolist()
        for way in WAYS:
            self._sums[way] *= self.learned.discount
            self._counts[way] *= self.learned.discount
        usable = [(r, u, w) for r, u, w in zip(roles, utilities, weights, strict=True) if math.isfinite(u)]
        for role, utility, weight in usable:
            if role in ROLES:
                self._sums[ROLES[role]] += utility
                self._counts[ROLES[role]] += 1
            self._sums["scored"] += self._batch_size * weight * utility
        self._counts["scored"] += self._batch_size

    def _choose(self) -> None:
        rates = self.rates
        best = max(WAYS, key=lambda way: rates[way])
        if rates[best] <= PAYS * rates["uniform"]:
            if self._error(best, "uniform") <= CLEAR * rates["uniform"]:
                self.way = "uniform"
        elif self.way != "uniform" or self._lead(best, "uniform", SURE[best]) > 0:
            leads = {way: self._lead(way, "learned", STAYS if way == self.way else SURE[way]) for way in WAYS}
            self.way = max(WAYS, key=lambda way: leads[way])

    def _lead(self, one: Way, other: Way, errors: float) -> float:
        """By how much its rate is above another's, less so many standard errors; none over itself."""
        return 0.0 if one == other else self._rate(one) - self._rate(other) - errors * self._error(one, other)

    def _error(self, one: Way, other: Way) -> float:
        """Standard error of the difference of two rates."""
        samples = sum(1 / (self._counts[way] * self._cost(way) ** 2) for way in (one, other))
        return self.learned.utility_deviation * math.sqrt(samples)

    def learn(self, gone: Sequence[Traits]) -> None:
        """Take note of the samples that have left, drawn or not."""
        self.learned.learn(gone)

    def state_dict(self) -> dict[str, Any]:
        """All that the future depends on, beside the options and the target."""
        return {
            "learned": self.learned.state_dict(),
            "rival": self._rival.state_dict(),
            "generator": self._generator.get_state(),
            "way": self.way,
            "sums": [self._sums[way] for way in WAYS],
            "counts": [self._counts[way] for way in WAYS],
            "seconds": {kind: list(times) for kind, times in self._seconds.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`. Raises ValueError if it is of other columns."""
        self.learned.load_state_dict(state["learned"])
        self._rival.load_state_dict(state["rival"])
        self._generator.set_state(state["generator"])
        self.way = state["way"]
        self._sums = dict(zip(WAYS, state["sums"], strict=True))
        self._counts = dict(zip(WAYS, state["counts"], strict=True))
        self._seconds = {kind: list(times) for kind, times in state["seconds"].items()}


def _middle(times: Sequence[float]) -> float:
    """The median, the lower of two; 0 without any."""
    return sorted(times)[(len(times) - 1) // 2] if times else 0.0
