"""The optimizer's preconditioner: how a change of the gradient becomes a change of the weights.

With Adam's second moment frozen for one step, the update is affine in the gradient, `Delta(G) = P * G + Delta_0`, with

    P = lr (1 - b1) / (1 - b1^t) / (sqrt(v / (1 - b2^(t-1))) + eps)        (element-wise, v from step t - 1)

Momentum and weight decay are in Delta_0 and cancel from every comparison of two updates. The linearisation is off by
9 % at step 10, 0.7 % at step 100 (simulated), and does not exist at step 1: until v has settled, use `plain`.

It is off without bound for weights that hardly had a gradient, as in the head's rows of rare tokens: there P is
thousands of times the usual, while Adam's real update, which takes the new gradient into v, stays as short as any. Such
rows would make up most of K, and few samples would keep a coefficient. So v is taken as the coming step will leave it
if the gradient is as large as is usual in its parameter: `anticipated`. The order of c is the same.

P does not factor, so Gram matrices under it need gradients written out. `rank_one` fits `P ~ x y^T`, which does.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

NEVER_UPDATED = 0.01  # share of weights without any gradient yet, up to which a matrix is fitted all the same

Preconditioner = Callable[[str], Tensor | None]
"""The preconditioner P of a parameter by name, in the parameter's shape; None stands for P = 1."""


def plain(name: str) -> None:
    """P = 1: inner products of the raw gradients."""


def adam_preconditioner(exp_avg_sq: Tensor, step: int, lr: float, betas: tuple[float, float], eps: float) -> Tensor:
    """P of the formula above, float32; zero where no gradient has been seen yet (v = 0).

    Such weights, rows of an embedding for tokens that have not come up, have no P: the formula's 1 / eps would
    let them make up almost all of K, while Adam's real first update of them is no longer than any other.

    `exp_avg_sq` and `step` are the optimizer's state *before* the update (so `step` is t - 1, at least 1).
    """
    beta1, beta2 = betas
    scale = lr * (1 - beta1) / (1 - beta1 ** (step + 1))
    # 1 / P, with the constants folded in: each of them would cost a pass over memory of its own.
    values = exp_avg_sq.float().sqrt().mul_(1 / (scale * (1 - beta2**step) ** 0.5)).add_(eps / scale).reciprocal_()
    return values.masked_fill_(exp_avg_sq == 0, 0) if _may_hold_zero(exp_avg_sq) else values


def anticipated(
    exp_avg_sq: Tensor, step: int, beta2: float, rows: Tensor | None = None, usual: Tensor | None = None
) -> Tensor:
    """The second moment after one more gradient of the usual size, `b2 v + (1 - b2) mean(v / (1 - b2^t))`, float32.

    Corrected for bias as `exp_avg_sq` at `step` is. The usual size is the mean over weights that have had a gradient;
    the others stay at zero. With `rows`, of those rows only. `usual`: that mean, if it is known.
    """
    values = exp_avg_sq.float()
    if usual is None:
        usual = values.sum() / values.count_nonzero().clamp(min=1)
    if rows is not None:
        values = values[rows]
    correction = (1 - beta2**step) / (1 - beta2 ** (step + 1))
    after = (values * (beta2 * correction)).add_(usual * ((1 - beta2) / (1 - beta2**step) * correction))
    return after.mul_(values != 0) if _may_hold_zero(values) else after


def _may_hold_zero(values: Tensor) -> bool:
    """Most parameters hold no weight that never had a gradient, and looking for one is cheaper than a mask.

    Not on a device, where looking would make the host wait for it.
    """
    return values.device.type != "cpu" or not values.numel() or bool(values.min() == 0)


class RowwisePreconditioner(ABC):
    """A preconditioner that gives some rows of a parameter by themselves."""

    @abstractmethod
    def __call__(self, name: str, rows: Tensor | None = None) -> Tensor | None:
        """P of a parameter, or of these rows of it (int64)."""


@dataclass(frozen=True, eq=False)
class AdamPreconditioner(RowwisePreconditioner):
    """P from the anticipated state of a torch Adam or AdamW; parameters without state yet get the plain P = 1.

    Learning rates count relative to the largest one, so a warm-up that starts at zero does not erase P. It is computed
    at each call: keeping it would cost as much memory as the parameters.
    """

    parameters: Mapping[str, Tensor]
    states: Mapping[Tensor, Mapping[str, Tensor]]
    groups: Mapping[Tensor, Mapping[str, Any]]  # of each parameter
    steps: Mapping[Tensor, int]  # updates that each parameter's moments have seen
    top_rate: float

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> "AdamPreconditioner":
        """That of an optimizer's current state."""
        groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        top_rate = max(group["lr"] for group in optimizer.param_groups) or 1.0
        return cls(parameters, optimizer.state, groups, _steps(optimizer), top_rate)

    def __call__(self, name: str, rows: Tensor | None = None) -> Tensor | None:
        parameter = self.parameters[name]
        state = self.states.get(parameter)
        if not state:
            return None
        group = self.groups[parameter]
        lr = group["lr"] / self.top_rate if group["lr"] else 1.0
        step = self.steps[parameter]
        second = anticipated(state["exp_avg_sq"], step, group["betas"][1], rows, self.usual(name))
        return adam_preconditioner(second, step, lr, group["betas"], group["eps"])

    def usual(self, name: str) -> Tensor | None:  # noqa: ARG002
        """The mean second moment of a parameter, where it is known beforehand."""
        return None


@runtime_checkable
class SelectiveOptimizer(Protocol):
    """An optimizer that knows its own preconditioner, as `MaskedAdamW` does."""

    def current_preconditioner(self, *, warm: bool) -> Preconditioner:
        """P of the next step; `warm` says whether its moments may be trusted. Of parameters in rows, of this rank's."""


def preconditioner_of(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], warmup_steps: int = 1
) -> Preconditioner:
    """P for the next step: plain until the optimizer has made `warmup_steps`, zero where an update is forbidden.

    Knows Adam, AdamW and what keeps its second moment as they do, plain SGD, and every `SelectiveOptimizer`. Raises
    ValueError, naming it, for an optimizer whose preconditioner is not known.
    """
    warm = optimizer_steps(optimizer) >= warmup_steps
    if isinstance(optimizer, SelectiveOptimizer):
        return optimizer.current_preconditioner(warm=warm)
    if any(group.get("amsgrad") for group in optimizer.param_groups):
        raise ValueError("the preconditioner of Adam with amsgrad=True is not known; set amsgrad=False")
    if all("betas" in group and "eps" in group for group in optimizer.param_groups):
        if any("exp_avg_sq" not in state for state in optimizer.state.values()):
            raise ValueError(f"{type(optimizer).__name__} keeps no exp_avg_sq, Adam's second moment; use torch's AdamW")
        return AdamPreconditioner.of(optimizer, parameters) if warm else plain
    if isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.SGD):
        return plain
    raise ValueError(f"the preconditioner of {type(optimizer).__name__} is not known; use torch's AdamW, Adam or SGD")


def at_rows(preconditioner: Preconditioner, name: str, rows: Tensor | None) -> Tensor | None:
    """P of some rows of a parameter, or of all. A pool's tokens touch few of a large table's."""
    if isinstance(preconditioner, RowwisePreconditioner):
        return preconditioner(name, rows)
    values = preconditioner(name)
    return values if values is None or rows is None else values[rows]


def squared(preconditioner: Preconditioner) -> Preconditioner:
    """P^2 of a preconditioner: inner products of the updates themselves, `<P g_i, P g_j>`."""

    def diagonal(name: str) -> Tensor | None:
        values = preconditioner(name)
        return None if values is None else values.square()

    return diagonal


def rank_one(diagonal: Tensor) -> tuple[Tensor, Tensor] | None:
    """The fit `P ~ x y^T` of a matrix: x (p,) and y (d,), float32; None where P is mostly zero, as under a mask.

    Adafactor's: with `v = P^-2`, `v_ij ~ (mean of row i) (mean of column j) / (mean of all)`, exact if v is of rank
    one. Fitted to v and not to P, so that a few weights that hardly had a gradient do not stand out; those that never
    had one (P = 0, v = 0) count as such.
    """
    moment = diagonal.float().reciprocal().square_()
    if not bool(torch.isfinite(moment.sum())):
        never = diagonal == 0
        if bool((never.float().mean() > NEVER_UPDATED) | never.all(0).any() | never.all(1).any()):
            return None
        moment.masked_fill_(never, 0.0)
    rows_p, columns_d = moment.mean(1), moment.mean(0)
    return rows_p.rsqrt(), columns_d.div_(rows_p.mean()).rsqrt_()


def optimizer_steps(optimizer: torch.optim.Optimizer) -> int:
    """Updates the optimizer's moments have seen; 0 before the first."""
    return max(_steps(optimizer).values(), default=0)


def _steps(optimizer: torch.optim.Optimizer) -> dict[Tensor, int]:
    """Updates each parameter's moments have seen; a fused optimizer's counts are read from the device at once."""
    counts = {p: torch.as_tensor(state["step"]) for p, state in optimizer.state.items() if "step" in state}
    if not counts:
        return {}
    device = next(iter(counts.values())).device
    steps = torch.stack([count.to(device) for count in counts.values()]).tolist()
    return dict(zip(counts, map(int, steps), strict=True))
