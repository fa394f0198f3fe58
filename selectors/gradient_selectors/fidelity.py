"""What an approximate Gram matrix costs the choice, measured against the exact one."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradient_selectors.coefficients import CoefficientSolver, Matrix, Vector
from gradient_selectors.filter_then_weight import with_ridge
from gradient_selectors.geometry import Geometry, rank_one
from gradient_selectors.gradients import GramMode
from gradient_selectors.interaction import Interaction


@dataclass(frozen=True)
class Fidelity:
    """How close an approximation comes.

    Attributes:
        rank_correlation: Spearman's, of c under P and under its rank-one fit. Selectors use the exact c; this tells how
            good the fit is that both approximations of K rest on.
        gram_error: relative Frobenius error of K.
        utility_lost: share of the optimum's utility that coefficients from the approximate K lose.
        utility_lost_rescaled: the same after the exact line search, which takes an error of K's scale out.
    """

    rank_correlation: float
    gram_error: float
    utility_lost: float
    utility_lost_rescaled: float


def fidelity(
    interaction: Interaction, samples: Sequence[int], mode: GramMode, solver: CoefficientSolver, ridge: float = 1e-3
) -> Fidelity:
    """Compare `mode` with the exact K of `samples`, of which at least one must point towards the target."""
    exact: Matrix = interaction.gradients.gram(samples, interaction.geometry).cpu().numpy()
    approximate: Matrix = mode(interaction.gradients, samples, interaction.geometry).cpu().numpy()
    linear: Vector = interaction.rows_N[list(samples)].cpu().double().numpy()
    hessian = with_ridge(exact, ridge)
    best = solver.solve(exact, linear, ridge).weights
    weights = solver.solve(approximate, linear, ridge).weights
    optimum = _utility(hessian, linear, best)
    alpha = max(0.0, float(linear @ weights)) / float(weights @ hessian @ weights)
    fitted = Interaction(interaction.gradients, interaction.target, _fitted(interaction.geometry))
    return Fidelity(
        rank_correlation=_spearman(interaction.rows_N, fitted.rows_N),
        gram_error=float(np.linalg.norm(approximate - exact) / np.linalg.norm(exact)),
        utility_lost=1 - _utility(hessian, linear, weights) / optimum,
        utility_lost_rescaled=1 - _utility(hessian, linear, alpha * weights) / optimum,
    )


def _utility(hessian: Matrix, linear: Vector, weights: Vector) -> float:
    return float(linear @ weights - 0.5 * weights @ hessian @ weights)


def _fitted(geometry: Geometry) -> Geometry:
    """The rank-one fit of every matrix, written out again."""

    def preconditioner(name: str) -> Tensor | None:
        values = geometry(name)
        scales = rank_one(values) if values is not None and values.ndim == 2 else None
        return values if scales is None else torch.outer(*scales)

    return preconditioner


def _spearman(first_N: Tensor, second_N: Tensor) -> float:
    ranks = [values.argsort().argsort().double() for values in (first_N, second_N)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
