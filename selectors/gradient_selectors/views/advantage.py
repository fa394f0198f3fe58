"""What an update is worth beside a uniform one, seen from samples of the target that had no say in it.

The samples that a selector chooses look best from the very gradient that chose them, so only another one can tell. And
an update is worth its direction: Adam makes all of them about equally long. So the utility of each side counts by the
length of its update in the metric of P: of `U = sum_i w_i g_i` it is `<U, P G'> / sqrt(<U, P U>)`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradient_selectors.capture.gradients import Gradient, PoolGradients
from gradient_selectors.preconditioner import Preconditioner

TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Comparison:
    """Both sides of one step, and how steady the target is.

    Attributes:
        chosen: alignment of the update with G', the gradient of samples of the target that had no say.
        uniform: the same of the mean gradient of as many samples of the pool, drawn uniformly.
        agreement: cosine of G' and the gradient that chose, in the metric of P: 1 without noise, 0 of
            noise alone. None where it was not asked for.
    """

    chosen: float
    uniform: float
    agreement: float | None


@torch.no_grad()
def compare(
    gradients: PoolGradients,
    coefficients: Tensor,
    targets: tuple[Gradient, Gradient],
    preconditioner: Preconditioner,
    generator: torch.Generator,
) -> Comparison | None:
    """Compare what was chosen with a uniform draw; None where nothing was, or a gradient is not finite.

    `coefficients`: (N,) or (L, N). `targets`: the gradient that chose, and G'. `generator`, on the CPU, draws. One
    parameter at a time: all are as large as the model. One update after the other: in pieces each takes another pass.
    """
    largest_N = coefficients if coefficients.ndim == 1 else coefficients.amax(0)
    usable = gradients.losses_N.isfinite().nonzero().squeeze(1).tolist()
    chosen = int((largest_N > 0).sum())
    if not chosen:
        return None
    uniform_N = torch.zeros(gradients.num_samples)
    uniform_N[[usable[i] for i in torch.randperm(len(usable), generator=generator)[:chosen]]] = 1 / chosen
    names, (choosing, fresh) = sorted(gradients.factors), targets
    agreeing = _summed(_products(preconditioner(name), choosing[name], fresh[name]) for name in names)
    sides = [
        _summed(_products(preconditioner(n), gradients.weighted_gradient_of(n, w), fresh[n]) for n in names)
        for w in (coefficients, uniform_N)
    ]
    if not all(bool(sums.isfinite().all()) for sums in (agreeing, *sides)):
        return None
    aligned = [float(sums[0]) / max(float(sums[1]), TINY) ** 0.5 for sums in sides]
    both = max(float(agreeing[1] * agreeing[2]), TINY) ** 0.5
    return Comparison(aligned[0], aligned[1], float(agreeing[0]) / both)


def _products(diagonal: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Inner products in the metric of P: of one with the other, and of each with itself."""
    one, other = left.flatten().float(), right.flatten().float()
    weighed = (one, other) if diagonal is None else (one * diagonal.flatten(), other * diagonal.flatten())
    return torch.stack([torch.dot(weighed[0], other), torch.dot(weighed[0], one), torch.dot(weighed[1], other)])


def _summed(products: Iterable[Tensor]) -> Tensor:
    total = torch.zeros(3, dtype=torch.float64)
    for found in products:
        total += found.double().cpu()
    return total
