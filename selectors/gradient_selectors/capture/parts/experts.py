"""Experts in one piece while a pass runs, and the factors of their weights with them.

transformers holds all experts of a layer in tensors (E, ...), and computes them in one of several ways that no hook can
see into. Here the rows are sorted by expert and by sample, and each of the two products hands over its inputs and its
output's gradient. Padding is sent nowhere: nothing looks at what becomes of it.

Experts are recognised by what they compute, as in `kinds`: two products, with whatever the module does between them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from gradient_selectors.capture.factors import Factor, Segments
from gradient_selectors.capture.kinds import Rows, close, probe_input
from gradient_selectors.capture.parts.expert_factors import Dispatch, ExpertOuter

STATED = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate", "down_proj")  # by transformers
DOWN = "down_proj"

Collect = Callable[[dict[str, Factor]], None]
"""Takes the factors of one product, by the parameters' names within the module."""


@dataclass
class Experts:
    """All experts of a layer.

    Attributes:
        up: name of the first product's weight.
        num_chosen: how many experts each token was sent to, in the last pass.
    """

    name: str
    module: Any
    up: str
    num_chosen: int = 1

    @property
    def numbers_of_token(self) -> int:
        """How many numbers a token leaves in the factors of both products: inputs, and gradients of outputs."""
        shapes: list[torch.Size] = [getattr(self.module, name).shape for name in (self.up, DOWN)]
        return self.num_chosen * sum(rows + columns for _, rows, columns in shapes)

    def forward(
        self,
        hidden_Rd: Tensor,
        index_RK: Tensor,
        weights_RK: Tensor,
        *,
        rows: Rows,
        anchor: Tensor,
        dtype: torch.dtype | None,
        collect: Collect,
    ) -> Tensor:
        """What the module computes for the N * T tokens of a pool, each sent to K experts with its weights.

        `anchor` requires a gradient, so that the first layer has a backward, too. `dtype`: of the products.
        """
        kept_R = rows.keep_R if rows.keep_R is not None else torch.arange(len(hidden_Rd), device=hidden_Rd.device)
        self.num_chosen = num_chosen = index_RK.shape[1]
        dispatch, order_S = _sorted(index_RK[kept_R], rows.segments, self.module.num_experts)
        # No row is gathered twice, so that the backward pass adds in one order on every device.
        sent = hidden_Rd[kept_R].unsqueeze(1).expand(-1, num_chosen, -1).flatten(0, 1)[order_S]
        call = _Call(self.module, dispatch, dtype or hidden_Rd.dtype, collect)
        inner = call.product(self.up, sent, anchor)
        inner = self.module._apply_gate(inner) if self.module.has_gate else self.module.act_fn(inner)
        outer = call.product(DOWN, inner, anchor) * weights_RK[kept_R].flatten()[order_S, None]
        back = torch.empty_like(order_S)
        back[order_S] = torch.arange(len(order_S), device=order_S.device)
        summed = outer[back].view(len(kept_R), num_chosen, -1).sum(1).to(hidden_Rd.dtype)
        return hidden_Rd.new_zeros(hidden_Rd.shape).index_copy(0, kept_R, summed)


@dataclass(frozen=True)
class _Call:
    """One call of a layer's experts."""

    module: Any
    dispatch: Dispatch
    dtype: torch.dtype
    collect: Collect

    def product(self, name: str, inputs: Tensor, anchor: Tensor) -> Tensor:
        weight = getattr(self.module, name)
        weight_Epd = weight.mT if self.module.is_transposed else weight
        bias_Ep = getattr(self.module, f"{name}_bias") if self.module.has_bias else None
        return cast(Tensor, _Product.apply(inputs, anchor, weight_Epd, bias_Ep, self, name))  # type: ignore[no-untyped-call]

    def collect_product(self, name: str, inputs: Tensor, grad: Tensor) -> None:
        left, right = (inputs, grad) if self.module.is_transposed else (grad, inputs)
        factors: dict[str, Factor] = {name: ExpertOuter(left, right, self.dispatch)}
        if self.module.has_bias:
            factors[f"{name}_bias"] = self.dispatch.lookup(grad.float())
        self.collect(factors)


class _Product(torch.autograd.Function):
    """`y = x W_e^T + b_e` with the expert e of each row. No weight gets a gradient here: `collect` takes it."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, _anchor: Tensor, weight_Epd: Tensor, bias_Ep: Tensor | None, call: _Call, name: str
    ) -> Tensor:
        ctx.call, ctx.name, ctx.dtype = call, name, inputs.dtype
        with torch.autocast(inputs.device.type, enabled=False):
            x = inputs.to(call.dtype)
            output = x.new_empty(len(x), weight_Epd.shape[1])
            for expert, rows in call.dispatch.used():
                torch.mm(x[rows], weight_Epd[expert].T.to(call.dtype), out=output[rows])
                if bias_Ep is not None:
                    output[rows] += bias_Ep[expert].to(call.dtype)
        ctx.save_for_backward(x, weight_Epd)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), call = grads, ctx.call
        x, weight_Epd = ctx.saved_tensors
        grad = grad.contiguous()
        call.collect_product(ctx.name, x, grad)
        if not ctx.needs_input_grad[0]:
            return (None,) * 6
        grad_x = torch.empty_like(x)
        for expert, rows in call.dispatch.used():
            torch.mm(grad[rows], weight_Epd[expert].to(grad.dtype), out=grad_x[rows])
        return grad_x.to(ctx.dtype), None, None, None, None, None


def recognise_experts(name: str, module: Any) -> Experts | None:
    """The experts that a module is, if it is made of them and nothing more."""
    if not all(hasattr(module, stated) for stated in STATED) or getattr(module, "has_post_expert_norm", False):
        return None
    up = "gate_up_proj" if module.has_gate else "up_proj"
    matrices = {up, DOWN}
    names = {f"{matrix}{end}" for matrix in matrices for end in (("", "_bias") if module.has_bias else ("",))}
    parameters = dict(module.named_parameters())
    if parameters.keys() != names or any(parameters[matrix].ndim != 3 for matrix in matrices):
        return None
    experts = Experts(name, module, up)
    return experts if _computes_the_same(experts, parameters[DOWN]) else None


@torch.no_grad()
def _computes_the_same(experts: Experts, down: Tensor) -> bool:
    num_experts, width = len(down), down.shape[2 if experts.module.is_transposed else 1]
    num_chosen = min(2, num_experts)
    hidden = probe_input(6, width, like=down)
    index = torch.stack([torch.arange(6) % num_experts, (torch.arange(6) + 1) % num_experts], 1)[:, :num_chosen]
    index, weights = index.to(down.device), probe_input(6, num_chosen, like=down).abs()
    try:
        want = type(experts.module).forward(experts.module, hidden, index, weights)
    except Exception:
        return False
    rows, anchor = Rows(2, 3, None, Segments((0, 3, 6))), torch.zeros((), device=down.device)
    got = experts.forward(hidden, index, weights, rows=rows, anchor=anchor, dtype=None, collect=_nothing)
    return isinstance(want, Tensor) and close(got, want)


def _nothing(_: dict[str, Factor]) -> None:
    """What is made of a probe's gradients."""


def _sorted(index_RK: Tensor, segments: Segments, num_experts: int) -> tuple[Dispatch, Tensor]:
    """Who is sent where, and the order of the R * K rows by expert and sample."""
    num_samples = segments.num_samples
    owners_R = segments.owners_R.to(index_RK.device)
    cells_S = (index_RK * num_samples + owners_R[:, None]).flatten()
    counts = torch.bincount(cells_S, minlength=num_experts * num_samples)
    return Dispatch(num_samples, (0, *counts.cumsum(0).tolist())), cells_S.argsort(stable=True)
