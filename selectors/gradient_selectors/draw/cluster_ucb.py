"""ClusterUCB for a stream: which of the waiting samples deserve a gradient, when clusters of cheap features are arms.

After "ClusterUCB: Efficient Gradient-Based Data Selection for Targeted Fine-Tuning of LLMs" (arXiv 2506.10288), which
`cluster_ucb_offline` has as published; what is ours, since a stream drifts and has no end, `ClusterUcb` says.

Shape suffixes: M samples waiting, K arms, n drawn.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradient_selectors.draw.arm_moments import ArmMoments, Numbers, Vector
from gradient_selectors.draw.clusters import StreamClusters, unit

CLIP = 10.0  # rewards, in units of their mean size: one broken sample must not rule its arm


@dataclass(frozen=True)
class StreamOptions:
    """Settings of `ClusterUcb`.

    Examples:
        >>> from gradient_selectors import StreamOptions
        >>> options = StreamOptions(num_clusters=8, per_arm=4)

    Attributes:
        num_clusters: arms.
        beta: standard deviations above the mean.
        discount: decay of an arm's earlier rewards with each step; about `1 / (1 - discount)` steps are remembered.
        shrinkage: pseudo-count of the average arm, towards which each arm's moments are shrunk.
        explore: share of the slots that are drawn uniformly.
        prior: pseudo-count of the reward an arm starts with: its similarity to the target.
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

    Examples:
        >>> from gradient_selectors import ClusterUcb, StreamOptions
        >>> features_Md = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
        >>> bandit = ClusterUcb(StreamOptions(num_clusters=4), seed=0, target_d=features_Md[0])
        >>> drawn = bandit.draw(features_Md, count=4)
        >>> bandit.observe(drawn.arms_n, torch.tensor([0.9, 0.1, 0.2, 0.1]))  # utilities, of all that were scored
        >>> bandit.learn(features_Md[drawn.indices_n])  # these have left

    A step is `draw` (waiting samples' features in, which to score out), then `observe` (their first-order utilities,
    of *all* that were scored), then `learn` (features of the samples that have left: drawn or aged out). Each
    sample moves the clusters once, when it leaves; those that wait may be read again after a restart.

    What makes the published index fit for a stream:

    - Moments are discounted. Discounting alone never returns to an arm, for it leaves its mean and spread as they are;
      so each arm is also lent `shrinkage` rewards of the average arm, which it falls back to when it is not drawn, and
      some slots are uniform.
    - Rewards are utilities relative to the target's own (`Interaction.relative_utilities_N`), over the discounted mean
      of their size; what exceeds it more than ten times is cut. Plain `c_i` falls fast at the start, as P and the
      target's gradient shrink: the arm that is drawn would sink below arms that were drawn earlier, or never.
    - Within an arm, what is most like the target comes first: clusters are coarse, and even the best one holds samples
      of other kinds.
    - An arm starts with the similarity of its centre to the target (z-score of the cosine over arms) as if it had been
      seen `prior` times. This costs nothing and is soon outweighed.
    - All slots of a step are filled before any of its rewards is seen, so the arm with the largest index would fill
      them all, even one that is drawn only to explore it. An arm fills no more slots than it has rewards to show, of
      which `prior` count; and at most `per_arm`, so that there is something to compare what is drawn with.
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
        deviations_K = self.uncertainty_K()
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

    def uncertainty_K(self) -> Vector:
        """Standard deviation of each arm's mean."""
        shrunk = self.moments.shrunk(self._options.shrinkage)
        deviations_K: Vector = np.sqrt(shrunk.variances_K / np.maximum(shrunk.counts_K, 1.0))
        return deviations_K

    def observe(self, arms_n: Tensor, utilities_n: Tensor) -> None:
        """Take note of the utilities of all scored samples, selected or not; those that are not finite are left out."""
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

    def state_dict(self) -> dict[str, Tensor]:
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

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`. Raises ValueError, changing nothing, if it is of other sizes or names."""
        expected = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
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
