"""What a bandit knows of its arms: running moments of their rewards, and the indices that follow from them.

NumPy, because a bandit makes thousands of small decisions, for which torch has more overhead.
Shape suffixes: K arms, n rewards.
"""

import math

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]


class ArmMoments:
    """Count, mean and spread of each arm's rewards; counts are fractions once they are discounted.

    Kept as sums of squared deviations (Welford), so that rewards of 1e-3 around 1e3 lose nothing.
    """

    def __init__(self, num_arms: int) -> None:
        self.counts_K: Vector = np.zeros(num_arms)
        self.means_K: Vector = np.zeros(num_arms)
        self.squares_K: Vector = np.zeros(num_arms)

    def add(self, arms_n: Numbers, rewards_n: Vector) -> None:
        """Take note of rewards. Their order does not matter, up to rounding."""
        num_arms = len(self.counts_K)
        counts_K = np.bincount(arms_n, minlength=num_arms).astype(np.float64)
        means_K = np.bincount(arms_n, rewards_n, num_arms) / np.maximum(counts_K, 1.0)
        squares_K: Vector = np.bincount(arms_n, (rewards_n - means_K[arms_n]) ** 2, num_arms).astype(np.float64)
        self.merge(counts_K, means_K, squares_K)

    def merge(self, counts_K: Vector, means_K: Vector, squares_K: Vector) -> None:
        """Take note of other moments of the same arms."""
        total_K = self.counts_K + counts_K
        share_K = counts_K / np.where(total_K > 0, total_K, 1.0)
        gap_K = means_K - self.means_K
        self.squares_K = self.squares_K + squares_K + gap_K**2 * self.counts_K * share_K
        self.means_K = self.means_K + gap_K * share_K
        self.counts_K = total_K

    def discount(self, factor: float) -> None:
        """Let all that was seen count `factor` times as much. Means and spreads stay."""
        self.counts_K = self.counts_K * factor
        self.squares_K = self.squares_K * factor

    @property
    def variances_K(self) -> Vector:
        """Population variance; 0 without rewards."""
        return self.squares_K / np.where(self.counts_K > 0, self.counts_K, 1.0)

    def pooled(self) -> tuple[float, float]:
        """Mean and variance of all arms' rewards taken together; 0 and 1 without any."""
        total = float(self.counts_K.sum())
        if total == 0:
            return 0.0, 1.0
        mean = float(self.counts_K @ self.means_K) / total
        return mean, float((self.squares_K + self.counts_K * (self.means_K - mean) ** 2).sum()) / total

    def shrunk(self, strength: float) -> "ArmMoments":
        """The same with `strength` more rewards for each arm, which are spread like those of all arms together."""
        mean, variance = self.pooled()
        combined = ArmMoments(len(self.counts_K))
        combined.merge(self.counts_K, self.means_K, self.squares_K)
        more_K = np.full_like(self.counts_K, strength)
        combined.merge(more_K, np.full_like(more_K, mean), more_K * variance)
        return combined

    def mean_std(self, beta: float) -> Vector:
        """The published index, `mean + beta std`; infinite without rewards, so that every arm has its turn."""
        return np.where(self.counts_K > 0, self.means_K + beta * np.sqrt(self.variances_K), np.inf)

    def ucb1(self) -> Vector:
        """`mean + sqrt(2 log t / n)`, whose bonus is made for rewards in [0, 1]; infinite without rewards."""
        played_K = self.counts_K > 0
        log_total = math.log(max(float(self.counts_K.sum()), 1.0))
        return np.where(played_K, self.means_K + np.sqrt(2 * log_total / np.where(played_K, self.counts_K, 1)), np.inf)
