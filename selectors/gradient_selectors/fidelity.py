"""What approximate views of an interaction cost the choice, measured against the exact ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradient_selectors.views.interaction import Interaction
from gradient_selectors.weigh.coefficients import CoefficientSolver, Matrix, Vector
from gradient_selectors.weigh.filter_then_weight import with_ridge


@dataclass(frozen=True)
class Fidelity:
    """How close an approximation comes.

    Attributes:
        rank_correlation: Spearman's, of the approximate and the exact c of the whole pool; 1 where c is exact.
        gram_error: relative Frobenius error of K.
        utility_lost: share of the optimum's utility that coefficients from the approximate c and K lose.
        utility_lost_rescaled: the same after the exact line search, which takes an error of K's scale out.
    """

    rank_correlation: float
    gram_error: float
    utility_lost: float
    utility_lost_rescaled: float


@dataclass(frozen=True)
class Seen:
    """What a view of a pool said: c of all its samples, and c and K of some of them."""

    rows_N: Tensor
    linear: Vector
    gram: Matrix


def seen_as(interaction: Interaction, samples: Sequence[int]) -> Seen:
    """Compute what is compared, so that the pool's factors need not be kept."""
    rows_N = interaction.rows_N.cpu()
    gram: Matrix = interaction.gram(samples).cpu().numpy()
    return Seen(rows_N, rows_N[list(samples)].double().numpy(), gram)


def fidelity(exact: Seen, approximate: Seen, solver: CoefficientSolver, ridge: float = 1e-3) -> Fidelity:
    """Compare two views of the same samples, of which at least one must point towards the target in both."""
    hessian = with_ridge(exact.gram, ridge)
    best = solver.solve(exact.gram, exact.linear, ridge).weights
    weights = solver.solve(approximate.gram, approximate.linear, ridge).weights
    optimum = _utility(hessian, exact.linear, best)
    alpha = max(0.0, float(exact.linear @ weights)) / float(weights @ hessian @ weights)
    return Fidelity(
        rank_correlation=_spearman(exact.rows_N, approximate.rows_N),
        gram_error=float(np.linalg.norm(approximate.gram - exact.gram) / np.linalg.norm(exact.gram)),
        utility_lost=1 - _utility(hessian, exact.linear, weights) / optimum,
        utility_lost_rescaled=1 - _utility(hessian, exact.linear, alpha * weights) / optimum,
    )


def _utility(hessian: Matrix, linear: Vector, weights: Vector) -> float:
    return float(linear @ weights - 0.5 * weights @ hessian @ weights)


def _spearman(first_N: Tensor, second_N: Tensor) -> float:
    ranks = [values.argsort().argsort().double() for values in (first_N, second_N)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
