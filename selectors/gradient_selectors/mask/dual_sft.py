"""DualSFT: which weights may move and which samples are worth training on, from one interaction matrix.

The matrix is `M[n, k] = u_k g_nk / N`, with the mean gradient `G` of a pool of N samples and

    u = lambda_new v_new + lambda_prior v_prior + lambda_anchor v_anchor - 1/2 eta (h * G)

Columns sum to `u * G`, the predicted fall of the validation loss for each weight; rows sum to `<u, g_n> / N`, that for
each sample. Both totals are `<u, G>`, and both are exact Shapley values of the diagonal quadratic model of one step.

From the authors' released code (arXiv 2605.06166): u without `v_anchor`, the two sums, h as Adam's second moment, the
self-distillation gradient `v_prior`, quotas and ranking of the mask. Ours: everything is a mean over samples (the
release adds a sum to means, so its second term grows with the pool) and the common factor eta is left out (in its half
precision u underflows to zero); h is corrected for bias; embeddings, norms and tied heads count like any other
parameter; and the refresh while training goes on, from moving averages of the gradients that the steps compute anyway.
Ours, too: `v_anchor`, the gradient of the anchors' own loss. `v_prior` is zero until the model has moved, so it cannot
guard the first mask, and it resists any change of an answer, for the better or the worse, only after it has come.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradient_selectors.capture.batch import Batch, micro_batches
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.gradients import Gradient, PoolGradients
from gradient_selectors.capture.shards import own_rows
from gradient_selectors.mask.masked_adamw import MaskChange, MaskedAdamW
from gradient_selectors.mask.rule import MaskRule, choose_units, unit_keys, unit_size
from gradient_selectors.mask.self_distillation import prior_gradient
from gradient_selectors.target import MICRO_BATCH, mean_gradient
from gradient_selectors.world.rows import RowsGradient

Curvature = Callable[[str], Tensor | None]
"""The curvature proxy h of a parameter by name, in the parameter's shape; None stands for zero."""


@dataclass(frozen=True)
class Response:
    """How the validation loss is thought to answer a step.

    Attributes:
        learning_rate: eta, which weighs the second-order term; 0 leaves first order.
        lambda_new: weight of the target gradient.
        lambda_prior: weight of the gradient that guards what the model already knows.
        lambda_anchor: weight of the anchors' own gradient.
    """

    learning_rate: float = 0.0
    lambda_new: float = 1.0
    lambda_prior: float = 0.2
    lambda_anchor: float = 0.0


def no_curvature(name: str) -> None:
    """First order: h = 0."""


@torch.no_grad()
def direction(
    response: Response,
    mean: Gradient,
    new: Gradient,
    prior: Gradient | None,
    curvature: Curvature,
    anchor: Gradient | None = None,
) -> dict[str, Tensor]:
    """The vector u of every parameter in `mean`, float32. Gradients that the others lack are zero.

    `mean` is the mean gradient G of the pool, `new`, `prior` and `anchor` are means over their own samples.
    """
    terms = (
        (response.lambda_new, new),
        (response.lambda_prior, prior or {}),
        (response.lambda_anchor, anchor or {}),
    )
    out = {}
    for name, mean_of_pool in mean.items():
        known = [(weight, gradient[name]) for weight, gradient in terms if name in gradient]
        u = known[0][1] * known[0][0] if known else torch.zeros_like(mean_of_pool)
        for weight, values in known[1:]:
            u.add_(values, alpha=weight)
        h = curvature(name) if response.learning_rate else None
        out[name] = u if h is None else u.addcmul_(h, mean_of_pool, value=-0.5 * response.learning_rate)
    return out


def column_scores(direction: Gradient, mean: Gradient) -> dict[str, Tensor]:
    """`u * G`: what each weight's movement is predicted to take off the validation loss, by parameter name."""
    return {name: u * mean[name] for name, u in direction.items()}


def row_scores(gradients: PoolGradients, direction: Gradient) -> Tensor:
    """`<u, g_n>` over all trainable parameters, (N,) float32; over the size of the whole pool they add to `<u, G>`."""
    return torch.stack(list(gradients.dots(direction).values())).sum(0)


def adam_curvature(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> Curvature:
    """The proxy h from a torch Adam or AdamW: its second moment, corrected for bias; zero before the first update."""
    betas = {p: group["betas"] for group in optimizer.param_groups for p in group["params"]}

    def curvature(name: str) -> Tensor | None:
        state = optimizer.state.get(parameters[name])
        if not state:
            return None
        beta2 = betas[parameters[name]][1]
        second: Tensor = state["exp_avg_sq"].float() / (1 - beta2 ** int(state["step"]))
        return second

    return curvature


@torch.no_grad()
def masked_curvature(optimizer: MaskedAdamW, mean: Gradient) -> Curvature:
    """The proxy h from a masked optimizer, which knows no second moment of masked weights.

    For those it is estimated as `ratio * G^2`, the ratio of second moment to squared mean being that of the parameter's
    kept weights, or of all kept weights where the parameter has none. Zero would favour masked weights over kept ones.
    Where parameters lie in rows, `mean` and the proxy are of this rank's, and this is a call of all ranks.
    """
    known = {name: optimizer.second_moments(name) for name in mean}
    totals = optimizer.world.sum(torch.stack([_moment_sums(*known[name], values) for name, values in mean.items()]))
    sums = dict(zip(mean, totals.tolist(), strict=True))
    overall = _ratio(*(sum(sums[name][i] for name in sums) for i in range(2)))

    def curvature(name: str) -> Tensor:
        units, second = known[name]
        estimate = mean[name].square().mul_(_ratio(*sums[name]) if sums[name][0] else overall)
        estimate.view(-1, second.shape[1]).index_copy_(0, units.long(), second)
        return estimate

    return curvature


def _moment_sums(units: Tensor, second: Tensor, mean: Tensor) -> Tensor:
    """Sums of the second moment and of the squared mean where the former is known, (2,) float64."""
    squares = mean.reshape(-1, second.shape[1]).index_select(0, units).square_()
    return torch.stack([second.sum(dtype=torch.float64), squares.sum(dtype=torch.float64)])


def _ratio(second: float, squared_mean: float) -> float:
    return second / squared_mean if squared_mean > 0 else 0.0


@dataclass(frozen=True)
class Anchors:
    """What the model knows already and should keep: samples, and the model that still knows it.

    Attributes:
        teacher: a frozen copy; None where self-distillation counts for nothing: it takes as much memory as the model.
    """

    batches: Sequence[Batch]
    teacher: nn.Module | None

    @classmethod
    def of(cls, model: nn.Module, batches: Iterable[Batch | Mapping[str, Any]], response: Response) -> "Anchors":
        """With a copy of the model as it is now: make it before a checkpoint is restored."""
        teacher = copy.deepcopy(model).requires_grad_(False) if response.lambda_prior else None
        return cls(tuple(micro_batches(map(Batch.of, batches), MICRO_BATCH)), teacher)

    def gradients(self, capture: GradientCapture, response: Response) -> tuple[Gradient | None, Gradient | None]:
        """The gradients of self-distillation and of the anchors' loss, each where it counts for something."""
        prior = None if self.teacher is None else prior_gradient(capture, self.teacher, self.batches)
        anchor = mean_gradient(capture, self.batches) if response.lambda_anchor else None
        return prior, anchor


@dataclass
class DualSft:
    """Refreshes the mask of an optimizer every `refresh_steps` steps, from the gradients of recent steps.

    The first masks do not last as long: the gradient of one step tells little of the next 50, and before the model has
    moved the gradient of self-distillation is zero. A mask is due again when twice as many gradients have been
    observed as it was chosen from.

    Keeps one float32 number for each parameter's every element, masked ones too: without it none could be called back.
    Of parameters that lie in rows on several ranks each keeps that of its own rows, and a refresh is a call of all.

    Examples:
        >>> from gradient_selectors import DualSft, MaskRule
        >>> mask = DualSft(MaskRule(density=0.05), refresh_steps=50)  # SelectionEngine(..., mask=mask)
        >>> mask.due
        False

    Attributes:
        rule: how the mask is chosen.
        response: weights of the terms of u.
        refresh_steps: steps between refreshes at most; the first is due as soon as one gradient has been observed.
        decay: of the moving average of the gradients.
        anchors: what the model should not lose, or None.
    """

    rule: MaskRule
    response: Response = Response()
    refresh_steps: int = 50
    decay: float = 0.9
    anchors: Anchors | None = None
    _average: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _observed: int = field(default=0, init=False)
    _since_refresh: int | None = field(default=None, init=False)  # None before the first

    def follow(
        self, capture: GradientCapture, optimizer: MaskedAdamW, gradient: Gradient, target: Gradient
    ) -> MaskChange | None:
        """Take in the gradient of a step's update, and refresh the mask if it is time; what changed, or None.

        `gradient` must be finite, and neither masked nor clipped yet.
        """
        self.observe(gradient)
        if not self.due:
            return None
        prior, anchor = (None, None) if self.anchors is None else self.anchors.gradients(capture, self.response)
        return self.refresh(optimizer, target, prior, anchor)

    @torch.no_grad()
    def observe(self, gradient: Gradient) -> None:
        """Take in the gradient of a step's update, before masking and clipping. It must be finite and is not kept.

        `PoolGradients.weighted_gradient` with weights that sum to 1 is a mean, as the target gradient is.
        """
        for name, values in gradient.items():
            if name not in self._average:
                self._average[name] = torch.zeros_like(values)
        for name, average in self._average.items():
            if name in gradient:
                own_rows(average).lerp_(own_rows(gradient[name]), 1 - self.decay)
            else:
                own_rows(average).mul_(self.decay)
        self._observed += 1
        if self._since_refresh is not None:
            self._since_refresh += 1

    @property
    def due(self) -> bool:
        """Whether it is time for a refresh."""
        if self._since_refresh is None:
            return self._observed > 0
        chosen_from = self._observed - self._since_refresh
        return self._since_refresh >= min(self.refresh_steps, chosen_from)

    @property
    def age(self) -> int:
        """Gradients observed since the last refresh; 0 before the first."""
        return self._since_refresh or 0

    @torch.no_grad()
    def refresh(
        self,
        optimizer: MaskedAdamW,
        target: Gradient,
        prior: Gradient | None = None,
        anchor: Gradient | None = None,
    ) -> MaskChange:
        """Choose a new mask and give it to `optimizer`, whose moments move with it. Call it between two steps.

        `target` is the mean gradient of the target samples, `prior` that of the self-distillation and `anchor` that
        of the anchors' loss, or None. Needs one more float32 number for each weight while it runs, and two for each
        that may move before or after. Raises ValueError before the first `observe`.
        """
        if not self._observed:
            raise ValueError("no gradient has been observed yet; call observe first")
        keys = self._unit_keys(optimizer, target, prior, anchor)
        sizes = {name: unit_size(p.shape, self.rule.granularity) for name, p in optimizer.parameters.items()}
        change = optimizer.replace_units(choose_units(keys, sizes, self.rule, optimizer.world))
        self._since_refresh = 0
        return change

    def _unit_keys(
        self, optimizer: MaskedAdamW, target: Gradient, prior: Gradient | None, anchor: Gradient | None
    ) -> dict[str, Tensor]:
        """A key for each unit in the order of the column scores, in the memory of the mean gradient."""
        corrected = 1 - self.decay**self._observed
        mean = {
            name: own_rows(self._average[name]) / corrected
            if name in self._average
            else torch.zeros_like(own_rows(p), dtype=torch.float32)
            for name, p in optimizer.parameters.items()
        }
        if isinstance(target, RowsGradient):
            target = target.own
        curvature = masked_curvature(optimizer, mean)
        keys = {}
        for name in optimizer.parameters:
            u = direction(self.response, {name: mean[name]}, target, prior, curvature, anchor)[name]
            keys[name] = unit_keys(mean.pop(name).mul_(u), self.rule)
        return keys

    def state_dict(self) -> dict[str, Any]:
        """The average and the counters; tensors share memory with the live ones."""
        counters = {"observed": self._observed, "since_refresh": self._since_refresh}
        return {"average": self._average, **counters}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._average = {name: tensor.clone() for name, tensor in state["average"].items()}
        self._observed, self._since_refresh = state["observed"], state["since_refresh"]
