"""ClusterUCB as published: which samples of a pool deserve a gradient, and which of those are selected.

The method of "ClusterUCB: Efficient Gradient-Based Data Selection for Targeted Fine-Tuning of LLMs" (arXiv 2506.10288)
and of its released code: after a cold start the next sample comes from the cluster with the largest `mean + beta std`
of the rewards drawn from it, and the best of all that were drawn are selected. The objective is the upper tail of
what was drawn, not its mean, so the index is a quantile of the arm and does not shrink with the number of draws.

Ours: exhausted arms are out (in the release they keep an index of zero, which beats every negative one), a cold start
of at least two draws (a single one has no spread and locks its arm out for good), a budget that the cold start cannot
exceed, and rewards of NaN for samples without a usable gradient, which are paid for but never selected.

Shape suffixes: N samples of the pool, K arms, n drawn.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradient_selectors.draw.arm_moments import ArmMoments, Numbers, Vector

Reward = Callable[[Tensor], Tensor]
"""Rewards of samples: their indices, (n,) int64, to (n,) floats; NaN where there is no usable gradient."""

Index = Literal["mean_std", "ucb1", "random"]

LAST = -1e300  # an index below that of any arm with rewards


@dataclass(frozen=True)
class OfflineOptions:
    """Settings of `select_offline`.

    Attributes:
        budget: share of the pool whose reward is computed.
        share: share of the pool that is selected.
        beta: standard deviations above the mean.
        cold_share: share of each cluster drawn at the start, which counts towards the budget.
        cold_draws: draws of each cluster at the start, whatever its size.
        pulls: samples drawn at a time; more make larger batches for `reward`, and decide later.
        index: `mean_std` as published; `ucb1`, and `random` draws from the whole pool, for comparison.
    """

    budget: float = 0.20
    share: float = 0.05
    beta: float = 1.0
    cold_share: float = 0.05
    cold_draws: int = 2
    pulls: int = 1
    index: Index = "mean_std"


@dataclass(frozen=True)
class Selection:
    """What was drawn and what was selected.

    Attributes:
        drawn_n: samples in the order they were drawn, int64.
        rewards_n: their rewards, float64.
        selected: the best of those drawn, best first.
    """

    drawn_n: Tensor
    rewards_n: Tensor
    selected: tuple[int, ...]


def select_offline(labels_N: Tensor, reward: Reward, options: OfflineOptions, generator: torch.Generator) -> Selection:
    """Draw `floor(budget N)` samples of a pool by the bandit and select the best `floor(share N)` of them.

    `labels_N`: cluster of each sample, int64 from 0; clusters may be empty. No sample is drawn twice.
    Raises ValueError for an empty pool or a share outside (0, 1].
    """
    for name, share in (("budget", options.budget), ("share", options.share)):
        if not 0 < share <= 1:
            raise ValueError(f"{name}={share} is no share of a pool; set it above 0 and to at most 1")
    if len(labels_N) == 0:
        raise ValueError("the pool is empty; there is nothing to select from")
    budget = _count(options.budget, len(labels_N))
    urns = _Urns(torch.zeros_like(labels_N) if options.index == "random" else labels_N, generator)
    moments = ArmMoments(len(urns.left_K))
    drawn, rewards = [urns.cold_start(options, budget)], []
    while True:
        rewards.append(_take_note(moments, urns, drawn[-1], reward))
        budget -= len(drawn[-1])
        if budget <= 0:
            break
        index_K = moments.ucb1() if options.index == "ucb1" else moments.mean_std(options.beta)
        index_K[urns.drawn_K & (moments.counts_K == 0)] = LAST  # all it gave so far was unusable
        index_K[urns.left_K == 0] = -np.inf
        drawn.append(urns.draw(int(index_K.argmax()), min(options.pulls, budget)))
    return _select(np.concatenate(drawn), np.concatenate(rewards), _count(options.share, len(labels_N)))


def _count(share: float, total: int) -> int:
    """`floor(share total)`, where the product's rounding error does not cost a sample."""
    return math.floor(share * total + 1e-9)


def _take_note(moments: ArmMoments, urns: "_Urns", drawn_n: Numbers, reward: Reward) -> Vector:
    if len(drawn_n) == 0:
        return np.empty(0)
    rewards_n: Vector = reward(torch.from_numpy(drawn_n)).double().cpu().numpy()
    usable_n = np.isfinite(rewards_n)
    moments.add(urns.labels_N[drawn_n[usable_n]], rewards_n[usable_n])
    return rewards_n


def _select(drawn_n: Numbers, rewards_n: Vector, num_selected: int) -> Selection:
    usable = np.flatnonzero(np.isfinite(rewards_n))
    best = usable[np.argsort(-rewards_n[usable], kind="stable")][:num_selected]
    return Selection(torch.from_numpy(drawn_n), torch.from_numpy(rewards_n), tuple(drawn_n[best].tolist()))


class _Urns:
    """Uniform draws without replacement from each cluster: every cluster is shuffled once and then read in order.

    Attributes:
        left_K: samples not yet drawn.
    """

    def __init__(self, labels_N: Tensor, generator: torch.Generator) -> None:
        self.labels_N: Numbers = labels_N.cpu().numpy()
        shuffled_N: Numbers = torch.randperm(len(labels_N), generator=generator).numpy()
        self._order_N = shuffled_N[np.argsort(self.labels_N[shuffled_N], kind="stable")]
        self._sizes_K = np.bincount(self.labels_N)
        self._ends_K = self._sizes_K.cumsum()
        self.left_K = self._sizes_K.copy()

    @property
    def drawn_K(self) -> npt.NDArray[np.bool_]:
        return self.left_K < self._sizes_K

    def draw(self, cluster: int, count: int) -> Numbers:
        """At most `count` samples of a cluster."""
        end = int(self._ends_K[cluster])
        start = end - int(self.left_K[cluster])
        drawn_n = self._order_N[start : min(start + count, end)]
        self.left_K[cluster] -= len(drawn_n)
        return drawn_n

    def cold_start(self, options: OfflineOptions, budget: int) -> Numbers:
        """Some of each cluster, one of each after the other until the budget is spent."""
        wanted_K = np.maximum((options.cold_share * self._sizes_K).astype(np.int64), options.cold_draws)
        labels_N = self.labels_N[self._order_N]
        ranks_N = np.arange(len(labels_N)) - (self._ends_K - self._sizes_K)[labels_N]
        cold = np.flatnonzero(ranks_N < wanted_K[labels_N])
        drawn_n = self._order_N[cold[np.argsort(ranks_N[cold], kind="stable")][:budget]]
        self.left_K -= np.bincount(self.labels_N[drawn_n], minlength=len(self.left_K))
        return drawn_n
