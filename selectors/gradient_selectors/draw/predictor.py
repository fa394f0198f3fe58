"""What a draw learns: a Bayesian linear regression that forgets.

Shape suffixes: n observations, d features, s draws.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

NOISE_PRIOR = 8.0  # observations that the noise of a new predictor, 1, counts as


class Predictor:
    """`reward = x^T theta + noise`, with a Gaussian prior on theta and observations that are forgotten:

        A <- k A + (1 - k) A0 + w X^T X        b <- k b + (1 - k) A0 theta0 + w X^T r
        theta ~ N(A^-1 b, s^2 A^-1)

    k is the discount, w the weight of the observations, and s^2 the discounted mean square of what was not predicted.
    What is no longer observed falls back to the prior.

    Examples:
        >>> from gradient_selectors.draw.predictor import Predictor
        >>> zeros_d, ones_d = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
        >>> predictor = Predictor(zeros_d, ones_d, discount=1.0)
        >>> x_nd = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> predictor.observe(x_nd, torch.tensor([2.0, -1.0], dtype=torch.float64))
        >>> [round(mean, 6) for mean in predictor.mean_d.tolist()]
        [1.0, -0.5]
    """

    def __init__(self, prior_d: Tensor, precision_d: Tensor, discount: float) -> None:
        """`prior_d`: theta0; `precision_d`: A0's diagonal, observations that each prior counts as; both float64."""
        self._prior_d, self._discount = prior_d, discount
        self._prior_dd = precision_d.diag()
        self._a_dd, self._b_d = self._prior_dd.clone(), precision_d * prior_d
        self._squares, self._counts = NOISE_PRIOR, NOISE_PRIOR

    @property
    def mean_d(self) -> Tensor:
        """The expected coefficients, (d,) float64."""
        mean_d1 = torch.cholesky_solve(self._b_d[:, None], torch.linalg.cholesky(self._a_dd))
        return mean_d1.squeeze(1)

    @property
    def deviations_d(self) -> Tensor:
        """The standard deviation of each coefficient, (d,) float64."""
        return (torch.cholesky_inverse(torch.linalg.cholesky(self._a_dd)).diagonal() * self._noise).sqrt()

    @property
    def _noise(self) -> float:
        return self._squares / self._counts

    def sample(self, count: int, generator: torch.Generator, inflation: float = 1.0) -> Tensor:
        """Draws of theta, (s, d) float64, their deviation times `inflation` (Thompson sampling)."""
        root_dd = torch.linalg.cholesky(self._a_dd)
        normal_ds = torch.randn(len(self._b_d), count, generator=generator, dtype=torch.float64)
        # With A = L L^T, the covariance of L^-T z is A^-1.
        spread_ds = torch.linalg.solve_triangular(root_dd.T, normal_ds, upper=True)
        draws_sd: Tensor = self.mean_d + inflation * self._noise**0.5 * spread_ds.T
        return draws_sd

    def observe(self, x_nd: Tensor, rewards_n: Tensor, weight: float = 1.0) -> None:
        """Take note of rewards, float64 and finite. `weight`: what each counts beside one of a probe."""
        keep = self._discount**weight
        errors_n = rewards_n - x_nd @ self.mean_d
        self._squares = keep * self._squares + weight * float(errors_n.square().sum())
        self._counts = keep * self._counts + weight * len(rewards_n)
        self._a_dd = keep * self._a_dd + (1 - keep) * self._prior_dd + weight * x_nd.T @ x_nd
        prior_d = self._prior_dd @ self._prior_d
        self._b_d = keep * self._b_d + (1 - keep) * prior_d + weight * x_nd.T @ rewards_n

    def state_dict(self) -> dict[str, Tensor]:
        """All that the future depends on, beside the options: copies."""
        return {
            "a_dd": self._a_dd.clone(),
            "b_d": self._b_d.clone(),
            "noise": torch.tensor([self._squares, self._counts], dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`. Raises ValueError, changing nothing, if it is of other features."""
        if state["b_d"].shape != self._b_d.shape:
            raise ValueError(f"it predicts from {len(state['b_d'])} features, not {len(self._b_d)}")
        self._a_dd, self._b_d = state["a_dd"].clone(), state["b_d"].clone()
        self._squares, self._counts = state["noise"].tolist()


class Standardiser:
    """Numbers in units of their own discounted spread around their discounted mean, cut at `limit`.

    Examples:
        >>> from gradient_selectors.draw.predictor import Standardiser
        >>> scale = Standardiser(discount=0.9)
        >>> scale(torch.tensor([1.0, 3.0], dtype=torch.float64)).tolist()
        [-1.0, 1.0]
    """

    def __init__(self, discount: float, limit: float = 4.0) -> None:
        self._discount, self._limit = discount, limit
        self._sums = torch.zeros(3, dtype=torch.float64)  # of ones, values and squares

    @property
    def deviation(self) -> Tensor:
        """The discounted spread of all that were seen, () float64; not a number before there is any."""
        count, total, squares = self._sums
        spread: Tensor = (squares / count - (total / count).square()).clamp(min=0).sqrt()
        return spread

    def __call__(self, values_n: Tensor) -> Tensor:
        """Take note of values, float64 and finite, and standardise them by all that were seen, these included."""
        own = torch.stack([torch.ones_like(values_n), values_n, values_n.square()])
        self._sums = self._discount * self._sums + own.sum(1)
        mean, deviation = self._sums[1] / self._sums[0], self.deviation
        if float(deviation) <= 1e-12 * max(1.0, abs(float(mean))):
            return torch.zeros_like(values_n)
        return ((values_n - mean) / deviation).clamp(-self._limit, self._limit)

    def state_dict(self) -> dict[str, Tensor]:
        return {"sums": self._sums.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._sums = state["sums"].clone()
