"""KNN-KDE: the target's mass goes to its nearest neighbours, and near copies share what one sample would get.

After "TSDS: Data Selection for Task-Specific Model Finetuning" (arXiv 2410.11303). As published: each target sample has
the mass 1 / T. The plan that carries it to the candidates minimises

    alpha / C * (sum of mass times distance) + (1 - alpha) * T * max over j, k of (density_k * mass_jk)

so that each target sample fills its nearest neighbours in turn, each up to one and the same limit over its density.
How many neighbours that is follows from alpha. The density of a candidate is the sum of max(0, 1 - (distance /
bandwidth)^2) over all candidates, itself among them: of two copies each has 2, and gets half.

Ours: the candidates are the samples that wait, so neighbours and densities are exact, of all of them, instead of a
search in a part; embeddings are unit vectors, so C, which stands for their length, is 1, and the bandwidth is where
two samples are no longer near copies (0.25 is a cosine of 0.97); samples are drawn without replacement.

Shape suffixes: T target samples, M samples waiting, d embedding dimensions.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gradient_selectors.features.traits import Traits, embeddings_of

NO_MASS = 1e-30  # of a sample that gets none: it is drawn after all others, at random


class KnnKde:
    """Draws in proportion to the mass that the target's samples carry to those that wait.

    Examples:
        >>> from gradient_selectors.draw.knn_kde import KnnKde
        >>> from gradient_selectors.features.traits import Traits
        >>> import numpy as np
        >>> waiting = [Traits(np.array([0]), torch.eye(4)[kind]) for kind in (3, 0, 2, 1)]
        >>> draw = KnnKde(torch.eye(4)[:2], torch.Generator().manual_seed(0), alpha=0.9)
        >>> draw.draw(waiting, count=2)
        [1, 3]
    """

    def __init__(
        self, targets_Td: Tensor, generator: torch.Generator, alpha: float = 0.5, bandwidth: float = 0.25
    ) -> None:
        """Raises ValueError if there is no target sample or a setting is out of its range.

        Args:
            targets_Td: embeddings of the target samples, (T, d), of any length.
            generator: source of the random draws, on the CPU.
            alpha: 1 takes each target sample's nearest neighbour alone, close to 0 all candidates; above 0, at most 1.
            bandwidth: samples at a smaller distance count as near copies, the more so the closer; above 0.
        """
        if len(targets_Td) == 0:
            raise ValueError("targets_Td has 0 samples: give embeddings of the target")
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha is {alpha}: choose it above 0 and at most 1")
        if not bandwidth > 0:
            raise ValueError(f"bandwidth is {bandwidth}: choose it above 0")
        self._targets_Td = F.normalize(targets_Td.double(), dim=1)
        self._generator = generator
        self._alpha, self._bandwidth = alpha, bandwidth

    def masses(self, waiting: Sequence[Traits]) -> Tensor:
        """What each sample gets, (M,) float64, 1 in sum. M is at least 1. O((T + M) M d + T M log(T M))."""
        embeddings_Md = embeddings_of(waiting).double()
        densities_M = densities(_squared_distances(embeddings_Md, embeddings_Md), self._bandwidth)
        distances_TM = _squared_distances(self._targets_Td, embeddings_Md).sqrt()
        return transported(distances_TM, densities_M, self._alpha)

    def draw(self, waiting: Sequence[Traits], count: int) -> list[int]:
        """`count` of the waiting samples, or all if there are fewer: indices in ascending order."""
        count = min(count, len(waiting))
        if count < 1:
            return []
        masses_M = self.masses(waiting).clamp(min=NO_MASS)
        return sorted(torch.multinomial(masses_M, count, generator=self._generator).tolist())

    def learn(self, gone: Sequence[Traits]) -> None:
        """Nothing: only those that wait share the mass."""

    def state_dict(self) -> dict[str, Tensor]:
        """The generator."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
        self._generator.set_state(state["generator"])


def densities(squares_MM: Tensor, bandwidth: float) -> Tensor:
    """Kernel density of each candidate among all, (M,) of the squared distances' dtype, at least 1: itself."""
    return (1 - squares_MM / bandwidth**2).clamp(min=0).sum(1).clamp(min=1)


def transported(distances_TM: Tensor, densities_M: Tensor, alpha: float) -> Tensor:
    """Mass that each candidate gets under the plan of this module's formula with C = 1: (M,) float64, 1 in sum.

    With the limit 1 / (T s) over a candidate's density, target sample j fills neighbours while the sum of 1 / density
    over them stays below s, and the next gets the rest. Whenever s passes such a sum, a larger s moves mass to a
    farther neighbour: the cost of distance rises by a step, and s stops where it outweighs the second term.

    Args:
        distances_TM: from target samples to candidates, (T, M) float64; ties go to the first candidate.
        densities_M: (M,) float64, above 0.
        alpha: weight of distances against evenness, above 0 and at most 1.
    """
    near = distances_TM.sort(dim=1, stable=True)
    filled_TM = (1 / densities_M)[near.indices].cumsum(1)
    beyond_T1 = torch.full_like(filled_TM[:, :1], torch.inf)
    steps_TM = near.values.diff(dim=1, append=beyond_T1) * filled_TM
    sums = filled_TM.flatten().sort(stable=True)
    costs = steps_TM.flatten()[sums.indices].cumsum(0)
    outweighs = (1 - alpha) / alpha * len(distances_TM)
    limit = sums.values[torch.searchsorted(costs, outweighs)]
    shares_TM = filled_TM.clamp(max=limit).diff(dim=1, prepend=torch.zeros_like(beyond_T1)) / limit
    return torch.zeros_like(shares_TM).scatter_(1, near.indices, shares_TM).mean(0)


def _squared_distances(rows_Ad: Tensor, rows_Bd: Tensor) -> Tensor:
    squares_AB = rows_Ad.square().sum(1)[:, None] + rows_Bd.square().sum(1) - 2 * rows_Ad @ rows_Bd.T
    return squares_AB.clamp(min=0)
