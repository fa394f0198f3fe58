"""LoRA's linear layers in one piece while a pass runs, and the factors of their adapters with them.

PEFT computes `base(x) + lora_B(lora_A(x)) * scaling` in five operations, of which three only read and write tensors as
large as the layer's output; backward has as many. Here the adapter's product is added in place to the base's, forward
and backward, and the scaling is applied to the narrow side. That saves passes over memory, and the memory itself.

A layer is recognised by what it computes, as in `kinds`. What computes anything else (DoRA, several adapters at once,
dropout, a quantised base) keeps PEFT's forward; its adapters are then two linear layers like any other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradient_selectors.capture.kinds import close, in_float32, probe_input, stored_transposed, try_call

PARTS = ("lora_A", "lora_B", "lora_dropout")  # of a layer, by adapter

Collect = Callable[[str, Tensor, Tensor], None]
"""Takes (name of a module, its input, its output's gradient) of one call."""


@dataclass(frozen=True)
class LoraLinear:
    """A layer `y = x W^T + b + s (x A^T) B^T`.

    Attributes:
        module: PEFT's, which holds the base and the adapters.
        down, up: names of the modules that hold A, (r, d), and B, (p, r).
        adapter: name of the one adapter that is active.
        transposed: the base holds W as (d, p).
    """

    module: Any
    down: str
    up: str
    adapter: str
    transposed: bool

    @property
    def is_plain(self) -> bool:
        """Whether the module still computes that: it may have been merged, or given other adapters, meanwhile."""
        module = self.module
        return not module.merged and not module.disable_adapters and list(module.active_adapters) == [self.adapter]

    @property
    def scaling(self) -> float:
        """The factor s of the adapter."""
        return float(self.module.scaling[self.adapter])

    def forward(self, x: Tensor, anchor: Tensor, autocast: torch.dtype | None, collect: Collect) -> Tensor:
        """What the module computes, in the dtype of autocast or else of `x`; its backward hands over A's and B's call.

        `anchor` requires a gradient, so that the first layer of a frozen model has a backward, too.
        """
        base, dtype = self.module.base_layer, autocast or x.dtype
        weight = base.weight.T if self.transposed else base.weight
        adapters = (held[self.adapter].weight for held in (self.module.lora_A, self.module.lora_B))
        constants = (None if value is None else value.to(dtype) for value in (weight, base.bias, *adapters))
        return cast(Tensor, _Fused.apply(x, anchor, *constants, self, collect))  # type: ignore[no-untyped-call]


class _Fused(torch.autograd.Function):
    """No weight gets a gradient here: `collect` takes what those of the adapters are made of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _anchor: Tensor, *rest: Any) -> Tensor:
        weight_pd, bias_p, down_rd, up_pr, ctx.layer, ctx.collect = rest
        ctx.dtype = x.dtype
        with torch.autocast(x.device.type, enabled=False):
            inputs = x.to(weight_pd.dtype)
            reduced = F.linear(inputs, down_rd)
            output = F.linear(inputs, weight_pd, bias_p)
            _add_product(output, reduced, up_pr.T, ctx.layer.scaling)
        ctx.save_for_backward(inputs, reduced, weight_pd, down_rd, up_pr)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), layer = grads, ctx.layer
        inputs, reduced, weight_pd, down_rd, up_pr = ctx.saved_tensors
        grad_reduced = (grad @ up_pr).mul_(layer.scaling)
        ctx.collect(layer.down, inputs, grad_reduced)
        ctx.collect(layer.up, reduced * layer.scaling, grad)
        none_for_the_rest = (None,) * 7
        if not ctx.needs_input_grad[0]:
            return None, *none_for_the_rest
        grad_inputs = grad @ weight_pd
        _add_product(grad_inputs, grad_reduced, down_rd, 1.0)
        return grad_inputs.to(ctx.dtype), *none_for_the_rest


def _add_product(out: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """`out += scale * left @ right` in one pass over `out`, which is contiguous: (..., m), (..., r) and (r, m)."""
    out.view(-1, out.shape[-1]).addmm_(left.reshape(-1, left.shape[-1]), right, alpha=scale)


def recognise_lora(name: str, module: Any) -> LoraLinear | None:
    """The layer that PEFT made of a linear one, if it has one active adapter and computes nothing more."""
    if not all(hasattr(module, part) for part in ("base_layer", *PARTS, "scaling", "active_adapters")):
        return None
    if len(module.active_adapters) != 1 or "forward" in vars(module):
        return None
    (adapter,), base = module.active_adapters, module.base_layer
    if any(adapter not in getattr(module, part) for part in PARTS) or not _keeps_all(module.lora_dropout[adapter]):
        return None
    down, up = module.lora_A[adapter], module.lora_B[adapter]
    weight: Any = getattr(base, "weight", None)
    if not _are_matrices(weight, down.weight, up.weight) or down.bias is not None or up.bias is not None:
        return None
    with torch.no_grad():
        transposed = stored_transposed(base, weight)
        if transposed is None or not _adds_product(module, adapter, down.weight.float(), up.weight.float()):
            return None
    return LoraLinear(module, f"{name}.lora_A.{adapter}", f"{name}.lora_B.{adapter}", adapter, transposed)


def _keeps_all(dropout: nn.Module) -> bool:
    """Whether it never drops anything, in whichever mode the module is now."""
    return getattr(dropout, "p", 0.0) == 0.0


def _are_matrices(*weights: Any) -> bool:
    """Whether all are matrices; a base that is packed into integers is none."""
    return all(isinstance(w, Tensor) and w.ndim == 2 and w.is_floating_point() for w in weights)


def _adds_product(module: Any, adapter: str, down_rd: Tensor, up_pr: Tensor) -> bool:
    """Whether the adapter's part is `s (x A^T) B^T`, tried with other weights: a fresh B is zero."""
    x = probe_input(2, 3, down_rd.shape[1], like=down_rd)
    other_rd = probe_input(*down_rd.shape, like=down_rd) / down_rd.shape[1] ** 0.5
    other_pr = probe_input(*up_pr.shape, like=up_pr) / up_pr.shape[1] ** 0.5
    weights = {f"lora_A.{adapter}.weight": other_rd, f"lora_B.{adapter}.weight": other_pr}
    product = F.linear(F.linear(x, other_rd), other_pr) * module.scaling[adapter]
    base = try_call(module.base_layer, x, in_float32(module.base_layer))
    of_base = in_float32(module.base_layer, "base_layer.")
    return base is not None and close(try_call(module, x, weights | of_base), base + product)
