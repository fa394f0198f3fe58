"""Filter, then weight: which candidates enter the update, and with what coefficient.

The method of "Filter-then-Weight: Online Data Selection and Reweighting for LLM Fine-Tuning" (arXiv 2604.00001). From
the paper: the update under the linearised Adam map, the match to a target update, the two stages, non-negative
coefficients. Ours, for the paper's text leaves them open: the metric `P^-1` (so `c_i = <g_i, P G>` and
`K_ij = <g_i, P g_j>`, commensurate without any rescaling), the filter by `c`, the ridge, the cut to k samples, the
normalisation.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradient_selectors.coefficients import CoefficientSolver, Matrix, Solution, Vector
from gradient_selectors.interaction import Decision, Interaction, SolverReport


@dataclass(frozen=True)
class FilterThenWeight:
    """Settings of the method.

    Attributes:
        chosen: samples k that may enter the update.
        survivors: samples m that the filter keeps at most; only they enter the quadratic term.
        solver: solves for the coefficients.
        ridge: regularisation relative to the mean of K's diagonal; gives duplicates equal coefficients.
        cap: bound on a coefficient, in units of the mean coefficient, or None.
    """

    chosen: int
    survivors: int
    solver: CoefficientSolver
    ridge: float = 1e-3
    cap: float | None = None

    def decide(self, interaction: Interaction) -> Decision:
        """Coefficients with a sum of 1; all zero if no candidate points towards the target."""
        rows_N = usable_rows(interaction)
        survivors, num_positive = self._filter(rows_N)
        if not survivors:
            return Decision(torch.zeros(len(rows_N)), num_positive=num_positive)
        gram = interaction.gram(survivors).cpu().numpy()
        linear = rows_N[survivors].cpu().double().numpy()
        kept, solution = self._weigh(gram, linear)
        weights_N = torch.zeros(len(rows_N))
        weights_N[[survivors[i] for i in kept]] = torch.tensor(solution.weights / solution.weights.sum()).float()
        return Decision(
            weights_N,
            num_positive,
            redundancy(gram[np.ix_(kept, kept)], linear[kept], solution.weights),
            SolverReport(solution.status, solution.seconds),
        )

    def _filter(self, rows_N: Tensor) -> tuple[list[int], int]:
        """The m candidates with the largest positive c, and how many are positive.

        A positive cosine `c_i / sqrt(K_ii)` and a positive c are the same; ranking the positive ones by c needs no
        K outside the survivors, which is what keeps the quadratic term cheap.
        """
        order = torch.argsort(rows_N, descending=True, stable=True).tolist()
        positive = [i for i in order if rows_N[i] > 0]
        return positive[: self.survivors], len(positive)

    def _weigh(self, gram: Matrix, linear: Vector) -> tuple[list[int], Solution]:
        """Solve on all survivors, keep the k that carry most of the utility `c_i w_i`, and solve again on those."""
        solution = self.solver.solve(gram, linear, self.ridge, self.cap)
        kept = [i for i in np.argsort(-linear * solution.weights, kind="stable") if solution.weights[i] > 0]
        if len(kept) <= self.chosen:
            return sorted(kept), _restrict(solution, sorted(kept))
        kept = sorted(kept[: self.chosen])
        again = self.solver.solve(gram[np.ix_(kept, kept)], linear[kept], self.ridge, self.cap)
        return kept, again


def usable_rows(interaction: Interaction) -> Tensor:
    """`c_i`, with minus infinity for candidates whose loss or gradient is not finite: they are never chosen."""
    rows_N = interaction.rows_N
    usable = torch.isfinite(rows_N) & torch.isfinite(interaction.gradients.losses_N)
    return torch.where(usable, rows_N, -torch.inf)


def redundancy(gram: Matrix, linear: Vector, weights: Vector) -> float:
    """What pairs of samples take away, `1/2 sum_{i != j} w_i w_j K_ij`, as a share of `c^T w`."""
    pairs = 0.5 * (weights @ gram @ weights - (weights**2) @ np.diag(gram))
    return float(pairs / (linear @ weights))


def _restrict(solution: Solution, kept: list[int]) -> Solution:
    return Solution(solution.weights[kept], solution.status, solution.seconds, solution.residual)
