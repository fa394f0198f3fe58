"""One step as a function: a pool of candidates in, one update and a report out."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.gradients import Gradient, PoolGradients
from gradient_selectors.mask.masked_adamw import MaskedAdamW
from gradient_selectors.preconditioner import optimizer_steps
from gradient_selectors.views.interaction import Decision, Interaction, Selector, equal_weights
from gradient_selectors.views.rank_one import rank_one_gram
from gradient_selectors.views.sketches import Projection, Sketches, project
from gradient_selectors.weigh.baselines import draw_uniform
from torch import Tensor

from stream_trainer.records import Sample
from stream_trainer.samples.collate import collate
from stream_trainer.settings.schema import OptimizerSettings
from stream_trainer.settings.selection import SelectionSettings
from stream_trainer.training.build import current_geometry
from stream_trainer.training.masking import Masking
from stream_trainer.training.optimizer import learning_rate
from stream_trainer.training.target import Target

APPLIED, SKIPPED_NONFINITE, SKIPPED_NONE_HELPS = "applied", "skipped_nonfinite", "skipped_none_helps"


@dataclass
class Learner:
    """What a step works on.

    Attributes:
        capture: hooks on the model.
        optimizer: over the capture's parameters; the masked one if weights are masked.
        selector: decides the coefficients, and the layers if it routes.
        target: None for methods that need no target gradient.
        masking: chooses the mask anew, or None if it stays as it is.
        generators: sources of every random choice, by stage (`selection.GENERATORS`).
        projections: of the target for `geometry: sketch`; made anew with the target's gradient, with the mask, and when
            the second moment has settled.
    """

    capture: GradientCapture
    optimizer: torch.optim.AdamW | MaskedAdamW
    selector: Selector
    target: Target | None
    masking: Masking | None
    selection: SelectionSettings
    optimization: OptimizerSettings
    pad_id: int
    generators: Mapping[str, torch.Generator]
    projections: dict[str, Projection] | None = None


@dataclass(frozen=True)
class StepReport:
    """What a step did.

    Attributes:
        result: one of `metrics.STEP_RESULTS`.
        candidates: indices into the pool of the samples that were scored.
        losses: loss of each candidate before the update (nats per token).
        weights: coefficient of each candidate in the update, the mean over layers if they differ; all zero if it was
            skipped.
        decision: what the selector said; its weights are of before `sample.weight` and a skip.
        utilities: `Interaction.relative_rows_N`, if the draw learns from them.
        gradient_norm: length of the gradient before clipping.
        seconds: time by phase.
    """

    result: str
    candidates: tuple[int, ...]
    losses: tuple[float, ...]
    weights: tuple[float, ...]
    decision: Decision
    utilities: tuple[float, ...] | None = None
    gradient_norm: float = math.nan
    learning_rate: float = math.nan
    target_refreshed: bool = False
    mask_refreshed: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def chosen(self) -> tuple[int, ...]:
        """Indices into the pool of the samples that entered the update."""
        return tuple(i for i, weight in zip(self.candidates, self.weights, strict=True) if weight > 0)


def train_step(learner: Learner, pool: Sequence[Sample]) -> StepReport:
    """Score the pool, decide, update once. The pool is not empty.

    A step whose gradient is not finite changes nothing and says so in the report.
    """
    clock = _Clock()
    candidates = _draw(learner, len(pool))
    samples = [pool[i] for i in candidates]
    target: Gradient = {}
    refreshed = False
    if learner.target is not None:
        target, refreshed = learner.target.current(learner.capture)
    new_geometry = optimizer_steps(learner.optimizer) == learner.selection.settle_steps
    if refreshed or new_geometry:
        learner.projections = None
    clock.lap("target")
    interaction = score(learner, samples, target)
    gradients = interaction.gradients
    utilities = tuple(interaction.relative_rows_N.tolist()) if learner.selection.draw == "cluster_ucb" else None
    clock.lap("score")
    decision = learner.selector.decide(interaction)
    weights = _final_weights(learner, decision, samples)
    clock.lap("weigh")
    update = _update(learner, gradients, weights, target)
    clock.lap("update")
    weights_N = weights if weights.ndim == 1 else weights.mean(0)
    if update.result != APPLIED:
        weights_N = torch.zeros_like(weights_N)
    return StepReport(
        result=update.result,
        candidates=tuple(candidates),
        losses=tuple(gradients.losses_N.tolist()),
        weights=tuple(weights_N.tolist()),
        decision=decision,
        utilities=utilities,
        gradient_norm=update.gradient_norm,
        learning_rate=update.learning_rate,
        target_refreshed=refreshed,
        mask_refreshed=update.mask_refreshed,
        seconds=clock.seconds,
    )


def score(learner: Learner, samples: Sequence[Sample], target: Gradient) -> Interaction:
    """One forward and one backward pass over the samples, seen from the target as the settings ask."""
    settings, capture = learner.selection, learner.capture
    geometry = current_geometry(learner.optimizer, capture.parameters, settings.settle_steps)
    batch = collate(samples, learner.pad_id)
    if settings.geometry == "sketch":
        if learner.projections is None:
            generator = learner.generators["sketch"]
            learner.projections = project(target, geometry, generator, settings.sketch_width, capture.head)
        head = learner.projections.get(capture.head or "")
        gradients = capture.run(batch, None if head is None else head.direction)
        sketches = Sketches(gradients, learner.projections, geometry)
        return Interaction(gradients, target, geometry, sketches.gram, sketches.rows, sketches.squared_length)
    gram = rank_one_gram if settings.geometry == "rank_one" else PoolGradients.gram
    return Interaction(capture.run(batch), target, geometry, gram)


def _draw(learner: Learner, num_samples: int) -> list[int]:
    if learner.selection.weigh == "uniform":
        return draw_uniform(num_samples, learner.selection.chosen, learner.generators["step"])
    return list(range(num_samples))


def _final_weights(learner: Learner, decision: Decision, samples: Sequence[Sample]) -> Tensor:
    """The decision's coefficients, (N,) or (L, N), times what the producer says a sample counts."""
    weights = decision.weights_N if decision.layer_weights_LN is None else decision.layer_weights_LN
    if not decision.chosen and learner.selection.when_none_helps == "uniform":
        drawn = draw_uniform(len(samples), learner.selection.chosen, learner.generators["step"])
        weights = equal_weights(len(samples), drawn)
    return reweighted(weights, torch.tensor([sample.weight for sample in samples], dtype=torch.float64))


def reweighted(weights: Tensor, stated_N: Tensor) -> Tensor:
    """Coefficients, (N,) or (L, N), times stated weights (N,) above 0; every row keeps its sum, natural or one."""
    sums = weights.double().sum(-1, keepdim=True)
    # In float64, and the largest scaled to one before each product and sum: any finite weight may be stated.
    scaled = _largest_to_one(weights.double()) * stated_N
    scaled = _largest_to_one(scaled)
    shares = scaled / scaled.sum(-1, keepdim=True).clamp(min=1.0)
    return torch.where(scaled.sum(-1, keepdim=True) > 0, shares * sums, weights.double()).float()


def _largest_to_one(rows: Tensor) -> Tensor:
    largest = rows.amax(-1, keepdim=True)
    return torch.where(largest > 0, rows / largest, 0.0)


@dataclass(frozen=True)
class _Update:
    result: str
    gradient_norm: float = math.nan
    learning_rate: float = math.nan
    mask_refreshed: bool = False


def _update(learner: Learner, gradients: PoolGradients, weights: Tensor, target: Gradient) -> _Update:
    """Book-keep the weighted gradient, let the mask follow, clip, take one optimizer step."""
    if not bool((weights > 0).any()):
        # Selectors never choose a sample whose loss is not finite; where none is, it is the model that is broken.
        sound = bool(gradients.losses_N.isfinite().any())
        return _Update(SKIPPED_NONE_HELPS if sound else SKIPPED_NONFINITE)
    parameters = learner.capture.parameters
    try:
        for name in gradients.factors:
            parameters[name].grad = gradients.weighted_gradient_of(name, weights)
        mask_refreshed = False
        if isinstance(learner.optimizer, MaskedAdamW):
            norm = _gradient_length(parameters)
            if not math.isfinite(norm):
                return _Update(SKIPPED_NONFINITE, norm)
            mask_refreshed = _follow(learner, target)
            if mask_refreshed:
                learner.projections = None
            learner.optimizer.mask_gradients()
        limit = learner.optimization.clip_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), limit))
        if not math.isfinite(norm):
            return _Update(SKIPPED_NONFINITE, norm)
        rate = learning_rate(learner.optimization, optimizer_steps(learner.optimizer))
        for group in learner.optimizer.param_groups:
            group["lr"] = rate
        learner.optimizer.step()
        return _Update(APPLIED, norm, rate, mask_refreshed)
    finally:
        learner.optimizer.zero_grad(set_to_none=True)


def _follow(learner: Learner, target: Gradient) -> bool:
    if learner.masking is None:
        return False
    gradient = {name: p.grad for name, p in learner.capture.parameters.items() if p.grad is not None}
    return learner.masking.follow(learner.capture, gradient, target, learner.pad_id)


def _gradient_length(parameters: Mapping[str, Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None]))


class _Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = now - self._last
        self._last = now
