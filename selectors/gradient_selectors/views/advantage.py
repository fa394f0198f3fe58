"""What an update is worth beside a uniform one, seen from samples of the target that had no say in it.

The samples that a selector chooses look best from the very gradient that chose them, so only another one can tell. And
an update is worth its direction: Adam makes all of them about equally long. So the utility of each side counts by the
length of its update in the metric of P: of `U = sum_i w_i g_i` it is `<U, P G'> / sqrt(<U, P U>)`.
"""

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
    parameter at a time is as large as the model.
    """
    largest_N = coefficients if coefficients.ndim == 1 else coefficients.amax(0)
    usable = gradients.losses_N.isfinite().nonzero().squeeze(1).tolist()
    chosen = int((largest_N > 0).sum())
    if not chosen:
        return None
    uniform_N = torch.zeros(gradients.num_samples)
    uniform_N[[usable[i] for i in torch.randperm(len(usable), generator=generator)[:chosen]]] = 1 / chosen
    sums = torch.zeros(7, dtype=torch.float64)
    for name in sorted(gradients.factors):
        diagonal = preconditioner(name)
        choosing, fresh = (target[name].flatten().float() for target in targets)
        updates = [gradients.weighted_gradient_of(name, w).flatten().float() for w in (coefficients, uniform_N)]
        sums += _products(diagonal, choosing, fresh, updates)
    if not bool(sums.isfinite().all()):
        return None
    aligned = [float(sums[i]) / max(float(sums[i + 2]), TINY) ** 0.5 for i in range(2)]
    return Comparison(aligned[0], aligned[1], float(sums[4]) / max(float(sums[5] * sums[6]), TINY) ** 0.5)


def _products(diagonal: Tensor | None, choosing: Tensor, fresh: Tensor, updates: list[Tensor]) -> Tensor:
    """Inner products in the metric of P: of both updates with G' and with themselves, then of the targets."""

    def product(left: Tensor, right: Tensor) -> Tensor:
        weighed = left if diagonal is None else left * diagonal.flatten()
        return torch.dot(weighed, right)

    found = [product(update, fresh) for update in updates]
    found += [product(update, update) for update in updates]
    found += [product(choosing, fresh), product(choosing, choosing), product(fresh, fresh)]
    return torch.stack(found).double().cpu()
