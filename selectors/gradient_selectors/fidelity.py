"""What approximate views of an interaction cost the choice, measured against the exact ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradient_selectors.coefficients import CoefficientSolver, Matrix, Vector
from gradient_selectors.filter_then_weight import with_ridge
from gradient_selectors.interaction import Interaction


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


def fidelity(
    exact: Interaction, approximate: Interaction, samples: Sequence[int], solver: CoefficientSolver, ridge: float = 1e-3
) -> Fidelity:
    """Compare two views of one pool on `samples`, of which at least one must point towards the target in both."""
    gram, near_gram = _matrix(exact.gram(samples)), _matrix(approximate.gram(samples))
    linear, near_linear = _linear(exact, samples), _linear(approximate, samples)
    hessian = with_ridge(gram, ridge)
    best = solver.solve(gram, linear, ridge).weights
    weights = solver.solve(near_gram, near_linear, ridge).weights
    optimum = _utility(hessian, linear, best)
    alpha = max(0.0, float(linear @ weights)) / float(weights @ hessian @ weights)
    return Fidelity(
        rank_correlation=_spearman(exact.rows_N, approximate.rows_N),
        gram_error=float(np.linalg.norm(near_gram - gram) / np.linalg.norm(gram)),
        utility_lost=1 - _utility(hessian, linear, weights) / optimum,
        utility_lost_rescaled=1 - _utility(hessian, linear, alpha * weights) / optimum,
    )


def _matrix(gram: Tensor) -> Matrix:
    matrix: Matrix = gram.cpu().numpy()
    return matrix


def _linear(interaction: Interaction, samples: Sequence[int]) -> Vector:
    linear: Vector = interaction.rows_N[list(samples)].cpu().double().numpy()
    return linear


def _utility(hessian: Matrix, linear: Vector, weights: Vector) -> float:
    return float(linear @ weights - 0.5 * weights @ hessian @ weights)


def _spearman(first_N: Tensor, second_N: Tensor) -> float:
    ranks = [values.argsort().argsort().double() for values in (first_N, second_N)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
