"""Weights that records state for themselves, and how they enter the coefficients."""

from dataclasses import replace

import torch
from torch import Tensor

from gradient_selectors.weigh.selector import Decision


def restated(decision: Decision, weights_N: Tensor) -> Decision:
    """A decision's coefficients times what each sample is stated to count."""
    by_layer = decision.coefficients_LN
    return replace(
        decision,
        coefficients_N=reweighted(decision.coefficients_N, weights_N),
        coefficients_LN=None if by_layer is None else reweighted(by_layer, weights_N),
    )


def restated_coefficients(coefficients_N: Tensor, weights_N: Tensor | None) -> Tensor:
    return coefficients_N if weights_N is None else reweighted(coefficients_N, weights_N)


def reweighted(coefficients: Tensor, weights_N: Tensor) -> Tensor:
    """Coefficients, (N,) or (L, N), times weights (N,) above 0; every row keeps its sum, natural or one."""
    sums = coefficients.double().sum(-1, keepdim=True)
    # In float64, and the largest scaled to one before each product and sum: any finite weight may be stated.
    scaled = _largest_to_one(coefficients.double()) * weights_N
    scaled = _largest_to_one(scaled)
    shares = scaled / scaled.sum(-1, keepdim=True).clamp(min=1.0)
    return torch.where(scaled.sum(-1, keepdim=True) > 0, shares * sums, coefficients.double()).float()


def _largest_to_one(rows: Tensor) -> Tensor:
    largest = rows.amax(-1, keepdim=True)
    return torch.where(largest > 0, rows / largest, 0.0)
