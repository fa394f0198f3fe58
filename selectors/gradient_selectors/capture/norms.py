"""RMS norms in one piece while a pass runs, and the factor of their weight with them.

A norm is written as a dozen operations on tensors as large as the layer's input, forward and backward, and its factor
needs half as many again. Each of them reads and writes memory and computes little. Here they are eight: with
`n = x / rms(x)` and `y = n w`, one product `n * dL/dy` serves both the gradient of w and that of x.

A norm is recognised by what it computes, as in `kinds`: Llama's, Gemma's `(1 + w)`, torch's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from gradient_selectors.capture.kinds import close, probe_input, try_call

Collect = Callable[[str, Tensor], None]
"""Takes (name of a norm, `n * dL/dy` of one call)."""
TINY = 1e-4  # size of an input of which epsilon makes something else


@dataclass(frozen=True)
class RmsNorm:
    """A norm `y = x / sqrt(mean(x^2) + epsilon) * (offset + w)`."""

    name: str
    module: nn.Module
    offset: float
    epsilon: float

    def forward(self, x: Tensor, anchor: Tensor | None, collect: Collect) -> Tensor:
        """What the module computes for a float32 input; its backward hands over the call.

        `anchor` requires a gradient, so that a norm whose input does not has a backward, too. It is None if the weight
        is not asked for.
        """
        weight_d = cast(Tensor, self.module.weight) + self.offset
        return cast(Tensor, _Fused.apply(x, anchor, weight_d, self, collect))  # type: ignore[no-untyped-call]

    def inverse_rms(self, x: Tensor) -> Tensor:
        """`1 / sqrt(mean(x^2) + epsilon)`, (..., 1)."""
        lengths: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return lengths.square_().div_(x.shape[-1]).add_(self.epsilon).rsqrt_()


class _Fused(torch.autograd.Function):
    """The weight gets no gradient here: `collect` takes what it is made of."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor | None, weight_d: Tensor, norm: RmsNorm, collect: Collect
    ) -> Tensor:
        inverse = norm.inverse_rms(x)
        normalised = x * inverse
        ctx.save_for_backward(normalised, inverse, weight_d)
        ctx.name, ctx.collect = norm.name, None if anchor is None else collect
        return normalised * weight_d

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        normalised, inverse, weight_d = ctx.saved_tensors
        products = grad * normalised
        if ctx.collect is not None:
            ctx.collect(ctx.name, products)
        grad_x = None
        if ctx.needs_input_grad[0]:
            along = (products @ weight_d).div_(-len(weight_d)).unsqueeze(-1)
            grad_x = (grad * weight_d).addcmul_(normalised, along).mul_(inverse)
        return grad_x, None, None, None, None


def recognise_rms_norm(name: str, module: nn.Module) -> RmsNorm | None:
    """The norm that a module is, if it is one in float32 and nothing more."""
    parameters = dict(module.named_parameters(recurse=False))
    if set(parameters) != {"weight"} or "forward" in vars(module):
        return None
    weight = parameters["weight"]
    if weight.ndim != 1 or weight.dtype != torch.float32:
        return None
    with torch.no_grad():
        x, other_d = probe_input(2, 3, len(weight), like=weight), probe_input(len(weight), like=weight)
        for offset in (0.0, 1.0):
            norm = RmsNorm(name, module, offset, _epsilon(module, offset, TINY * x))
            want = [v * norm.inverse_rms(v) * (other_d + offset) for v in (x, TINY * x)]
            got = [try_call(module, v, {"weight": other_d}) for v in (x, TINY * x)]
            if all(close(a, b) for a, b in zip(got, want, strict=True)):
                return norm
    return None


def _epsilon(module: nn.Module, offset: float, x: Tensor) -> float:
    """What is added to the mean square, seen from what becomes of a small input; 0 if that cannot be told."""
    output = try_call(module, x, {"weight": torch.full_like(x[0, 0], 1 - offset)})
    if output is None or output.shape != x.shape:
        return 0.0
    squares, shrunk = x.double().square(), output.double().square()
    added = (squares.sum(-1) / shrunk.sum(-1) - squares.mean(-1)).mean()
    return max(0.0, float(added)) if bool(torch.isfinite(added)) else 0.0
