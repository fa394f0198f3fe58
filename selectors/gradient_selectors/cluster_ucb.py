"""ClusterUCB: which samples deserve a gradient at all, when clusters of cheap features are the arms of a bandit.

The method of "ClusterUCB: Efficient Gradient-Based Data Selection for Targeted Fine-Tuning of LLMs" (arXiv 2506.10288)
and of its released code: after a cold start the next sample comes from the cluster with the largest `mean + beta std`
of the rewards drawn from it, and the best of all that were drawn are selected. The objective is the upper tail of
what was drawn, not its mean, so the index is a quantile of the arm and does not shrink with the number of draws.

`select_offline` is that, for a pool that is all there at once. Ours: exhausted arms are out (in the release they keep
an index of zero, which beats every negative one), a cold start of at least two draws (a single one has no spread and
locks its arm out for good), a budget that the cold start cannot exceed, and rewards of NaN for samples without a
usable gradient, which are paid for but never selected.

`ClusterUcb` is ours, for a stream: see there.

Shape suffixes: N samples of a pool, M samples waiting, K arms, n drawn.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradient_selectors.arm_moments import ArmMoments, Numbers, Vector
from gradient_selectors.clusters import StreamClusters, unit

Reward = Callable[[Tensor], Tensor]
"""Rewards of samples: their indices, (n,) int64, to (n,) floats; NaN where there is no usable gradient."""

Index = Literal["mean_std", "ucb1", "random"]

LAST = -1e300  # an index below that of any arm with rewards
CLIP = 10.0  # a stream's rewards, in units of their mean size: one broken sample must not rule its arm


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
        chosen: the best of those drawn, best first.
    """

    drawn_n: Tensor
    rewards_n: Tensor
    chosen: tuple[int, ...]


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


def _select(drawn_n: Numbers, rewards_n: Vector, num_chosen: int) -> Selection:
    usable = np.flatnonzero(np.isfinite(rewards_n))
    best = usable[np.argsort(-rewards_n[usable], kind="stable")][:num_chosen]
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


@dataclass(frozen=True)
class StreamOptions:
    """Settings of `ClusterUcb`.

    Attributes:
        num_clusters: arms.
        beta: standard deviations above the mean.
        discount: what an arm's earlier rewards count for after each step; about `1 / (1 - discount)` steps count.
        shrinkage: rewards that each arm is lent from all arms together.
        explore: share of the slots that are drawn uniformly.
        prior: rewards that an arm's likeness to the target counts for at its start.
        thompson: add to each slot's index a draw from the uncertainty of the arm's mean.
        memory: decay of the clusters with each sample.
        per_arm: slots of a draw that one arm fills at most while others have samples, whatever it has shown; or None.
    """

    num_clusters: int = 16
    beta: float = 1.0
    discount: float = 0.93
    shrinkage: float = 2.0
    explore: float = 0.05
    prior: float = 2.0
    thompson: bool = False
    memory: float = 0.999
    per_arm: int | None = None


@dataclass(frozen=True)
class Draw:
    """Samples drawn from those waiting, (n,) int64 in ascending order, and the arm of each."""

    indices_n: Tensor
    arms_n: Tensor


class ClusterUcb:
    """The bandit over a stream: clusters, rewards and scale all forget, and everything follows from state and input.

    A step is `draw` (waiting samples' features in, which to score out), then `observe` (their first-order utilities,
    of *all* that were scored), then `learn` (features of the samples that have left: drawn or aged out). Each
    sample moves the clusters once, when it leaves; those that wait may be read again after a restart.

    What makes the published index fit for a stream:

    - Moments are discounted. Discounting alone never returns to an arm, for it leaves its mean and spread as they are;
      so each arm is also lent `shrinkage` rewards of the average arm, which it falls back to when it is not drawn, and
      some slots are uniform.
    - Rewards are utilities relative to the target's own (`Interaction.relative_rows_N`), over the discounted mean of
      their size; what exceeds that mean more than ten times is cut. Plain `c_i` fell by a factor of 300 within 13 steps
      of SmolLM2: the arm that was drawn sank below arms that had been drawn before, or never.
    - Within an arm, what is most like the target comes first: clusters are coarse, and the purest one of SmolLM2's
      held 55 % of the target's kind.
    - An arm starts with the likeness of its centre to the target (z-score of the cosine over arms) as if it had been
      seen `prior` times. This costs nothing and is soon outweighed.
    - All slots of a step are filled before any of its rewards is seen, so the arm with the largest index would fill
      them all: with pools of 4, one step in four trained on an arm that was only to be looked at. An arm fills no more
      slots than it has rewards to show, of which `prior` count; and at most `per_arm`, so that there is something to
      compare what is drawn with.
    """

    def __init__(self, options: StreamOptions, seed: int, target_d: Tensor) -> None:
        """`target_d`: mean feature of the target samples; its size is the size of all features."""
        self._options = options
        self._generator = torch.Generator().manual_seed(seed)
        self._target_d = unit(target_d[None])[0]
        self.clusters = StreamClusters(options.num_clusters, len(target_d), options.memory)
        self.moments = ArmMoments(options.num_clusters)
        self._size_sum, self._size_count = 0.0, 0.0

    @property
    def scale(self) -> float:
        """Discounted mean size of the utilities; 0 before the first."""
        return self._size_sum / self._size_count if self._size_count > 0 else 0.0

    def draw(self, features_Md: Tensor, count: int) -> Draw:
        """`count` of the waiting samples, or all if there are fewer. The first draw founds the clusters."""
        if len(features_Md) == 0:
            return Draw(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
        if not self.clusters.founded:
            self.clusters.found(features_Md, self._generator)
            self._start_arms(range(self._options.num_clusters))
        arms_M = self.clusters.assign(features_Md)
        shuffled_M = torch.randperm(len(arms_M), generator=self._generator)
        count = min(count, len(arms_M))
        num_uniform = int((torch.rand(count, generator=self._generator) < self._options.explore).sum())
        uniform, others = shuffled_M[:num_uniform], shuffled_M[num_uniform:]
        others = others[torch.argsort(-(features_Md[others] @ self._target_d), stable=True)]
        drawn_n = torch.cat([uniform, self._best(others, arms_M, count - num_uniform)]).sort().values
        return Draw(drawn_n, arms_M[drawn_n])

    def _best(self, samples: Tensor, arms_M: Tensor, count: int) -> Tensor:
        """`count` of the samples by their arms' index; those of one arm in the order they come."""
        index_K, slots_K = self.index_K(), self._slots_K(count)
        if not self._options.thompson:
            arms_m: Numbers = arms_M[samples].numpy()
            order = np.argsort(-index_K[arms_m], kind="stable")
            late = _ranks_within(arms_m[order]) >= slots_K[arms_m[order]]
            return samples[torch.from_numpy(order[np.argsort(late, kind="stable")][:count])]
        deviations_K = self._uncertainty_K()
        noise_nK = torch.randn(count, len(index_K), generator=self._generator, dtype=torch.float64).numpy()
        urns = [samples[arms_M[samples] == arm].tolist()[::-1] for arm in range(len(index_K))]
        drawn: list[int] = []
        taken_K = np.zeros(len(index_K), dtype=np.int64)
        for noise_K in noise_nK:
            live_K = np.array([len(urn) > 0 for urn in urns])
            open_K = live_K & (taken_K < slots_K)
            arm = int(np.where(open_K if open_K.any() else live_K, index_K + deviations_K * noise_K, -np.inf).argmax())
            drawn.append(urns[arm].pop())
            taken_K[arm] += 1
        return torch.tensor(drawn, dtype=torch.int64)

    def _slots_K(self, count: int) -> Numbers:
        """How many of `count` slots an arm fills at most while others have samples: never more than it has rewards."""
        seen_K = np.maximum(1, self.moments.counts_K.astype(np.int64))
        return np.minimum(seen_K, self._options.per_arm or count)

    def index_K(self) -> Vector:
        """Each arm's `mean + beta std` after shrinkage, in units of the utilities' mean size."""
        return self.moments.shrunk(self._options.shrinkage).mean_std(self._options.beta)

    def _uncertainty_K(self) -> Vector:
        """Standard deviation of each arm's mean."""
        shrunk = self.moments.shrunk(self._options.shrinkage)
        deviations_K: Vector = np.sqrt(shrunk.variances_K / np.maximum(shrunk.counts_K, 1.0))
        return deviations_K

    def observe(self, arms_n: Tensor, utilities_n: Tensor) -> None:
        """Take note of the utilities of all samples that were scored, chosen or not; those not finite are left out."""
        usable_n = torch.isfinite(utilities_n).cpu()
        if not bool(usable_n.any()):
            return
        values_n: Vector = utilities_n.cpu().double()[usable_n].numpy()
        sizes_n = np.abs(values_n)
        if self.scale > 0:
            sizes_n = np.minimum(sizes_n, CLIP * self.scale)
        discount = self._options.discount
        self._size_sum = discount * self._size_sum + float(sizes_n.sum())
        self._size_count = discount * self._size_count + len(sizes_n)
        rewards_n = np.clip(values_n / (self.scale or 1.0), -CLIP, CLIP)
        self.moments.discount(discount)
        self.moments.add(arms_n.cpu()[usable_n].numpy(), rewards_n)

    def learn(self, features_Nd: Tensor) -> None:
        """Let the clusters follow the samples that have left. An arm whose cluster is founded anew starts again."""
        if len(features_Nd):
            self._start_arms(self.clusters.learn(features_Nd))

    def _start_arms(self, arms: Iterable[int]) -> None:
        founded = self.clusters.masses_K.numpy() > 0
        likeness_K: Vector = (self.clusters.centres_Kd @ self._target_d).double().numpy()
        spread = float(likeness_K[founded].std())
        score_K = (likeness_K - likeness_K[founded].mean()) / spread if spread > 1e-6 else np.zeros_like(likeness_K)
        for arm in arms:
            known = founded[arm]
            self.moments.counts_K[arm] = self._options.prior if known else 0.0
            self.moments.means_K[arm] = score_K[arm] if known else 0.0
            self.moments.squares_K[arm] = self._options.prior if known else 0.0

    def state(self) -> dict[str, Tensor]:
        """Everything that the future depends on, beside the options: copies, on the CPU."""
        return {
            "sums_Kd": self.clusters.sums_Kd.clone(),
            "masses_K": self.clusters.masses_K.clone(),
            "counts_K": torch.from_numpy(self.moments.counts_K.copy()),
            "means_K": torch.from_numpy(self.moments.means_K.copy()),
            "squares_K": torch.from_numpy(self.moments.squares_K.copy()),
            "scale": torch.tensor([self._size_sum, self._size_count], dtype=torch.float64),
            "target_d": self._target_d.clone(),
            "generator": self._generator.get_state(),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`. Raises ValueError, and changes nothing, if it is of other sizes or has other names."""
        expected = {name: tuple(tensor.shape) for name, tensor in self.state().items()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if found != expected:
            raise ValueError(
                f"state of {found.get('sums_Kd')} clusters by features does not fit {expected['sums_Kd']}; "
                "use the options it was saved with, or start without it"
            )
        self.clusters.sums_Kd = state["sums_Kd"].clone()
        self.clusters.masses_K = state["masses_K"].clone()
        self.moments.counts_K = state["counts_K"].numpy().copy()
        self.moments.means_K = state["means_K"].numpy().copy()
        self.moments.squares_K = state["squares_K"].numpy().copy()
        self._size_sum, self._size_count = state["scale"].tolist()
        self._target_d = state["target_d"].clone()
        self._generator.set_state(state["generator"])


def _ranks_within(arms_m: Numbers) -> Numbers:
    """How many earlier ones are of the same arm, for each."""
    order = np.argsort(arms_m, kind="stable")
    starts = np.searchsorted(arms_m[order], arms_m[order])
    ranks_m = np.empty(len(arms_m), dtype=np.int64)
    ranks_m[order] = np.arange(len(arms_m)) - starts
    return ranks_m
