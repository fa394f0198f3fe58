"""One step as a function: a pool of candidates in, one update and a report out."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from gradient_selectors.baselines import Full, TopK, draw_uniform
from gradient_selectors.capture import GradientCapture
from gradient_selectors.coefficients import CoefficientSolver
from gradient_selectors.filter_then_weight import FilterThenWeight
from gradient_selectors.geometry import Geometry, adam_geometry, optimizer_steps, plain
from gradient_selectors.gradients import Gradient, PoolGradients
from gradient_selectors.interaction import Decision, Interaction, Selector, equal_weights
from torch import Tensor

from stream_trainer.batches import collate
from stream_trainer.records import Sample
from stream_trainer.settings import OptimizerSettings, SelectionSettings
from stream_trainer.target import Target

APPLIED, SKIPPED_NONFINITE, SKIPPED_NONE_HELPS = "applied", "skipped_nonfinite", "skipped_none_helps"


@dataclass
class Learner:
    """What a step works on.

    Attributes:
        capture: hooks on the model.
        optimizer: torch's AdamW over the capture's parameters.
        selector: decides the coefficients.
        target: None for methods that need no target gradient.
        generator: source of every random choice of the step.
    """

    capture: GradientCapture
    optimizer: torch.optim.AdamW
    selector: Selector
    target: Target | None
    selection: SelectionSettings
    optimization: OptimizerSettings
    pad_id: int
    generator: torch.Generator


@dataclass(frozen=True)
class StepReport:
    """What a step did.

    Attributes:
        result: one of `metrics.STEP_RESULTS`.
        candidates: indices into the pool of the samples that were scored.
        losses: loss of each candidate before the update (nats per token).
        weights: coefficient of each candidate in the update; all zero if it was skipped.
        decision: what the selector said; its weights are of before `sample.weight` and a skip.
        gradient_norm: length of the gradient before clipping.
        seconds: time by phase.
    """

    result: str
    candidates: tuple[int, ...]
    losses: tuple[float, ...]
    weights: tuple[float, ...]
    decision: Decision
    gradient_norm: float = math.nan
    learning_rate: float = math.nan
    target_refreshed: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def chosen(self) -> tuple[int, ...]:
        """Indices into the pool of the samples that entered the update."""
        return tuple(i for i, weight in zip(self.candidates, self.weights, strict=True) if weight > 0)


def make_selector(settings: SelectionSettings) -> Selector:
    """The selector that the settings ask for; `uniform` draws before the pass and weighs all it drew the same."""
    if settings.weigh == "filter_then_weight":
        return FilterThenWeight(
            chosen=settings.chosen,
            survivors=math.ceil(settings.survivors * settings.chosen),
            solver=CoefficientSolver(settings.solver_time_limit_s),
            ridge=settings.ridge,
            cap=settings.max_coefficient,
        )
    return TopK(settings.chosen) if settings.weigh == "top_k" else Full()


def make_optimizer(capture: GradientCapture, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; biases and norms (one dimension) are not decayed."""
    matrices = [p for p in capture.parameters.values() if p.ndim > 1]
    vectors = [p for p in capture.parameters.values() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,  # one pass over memory instead of about ten
    )


def learning_rate(settings: OptimizerSettings, updates: int) -> float:
    """Learning rate of the update that follows `updates` earlier ones."""
    if updates < settings.warmup_steps:
        return settings.learning_rate * (updates + 1) / settings.warmup_steps
    if settings.schedule == "constant" or settings.decay_steps is None:
        return settings.learning_rate
    progress = min(1.0, (updates - settings.warmup_steps) / settings.decay_steps)
    remaining = 1 - progress if settings.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return settings.learning_rate * (settings.final_share + (1 - settings.final_share) * remaining)


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
    clock.lap("target")
    gradients = learner.capture.run(collate(samples, learner.pad_id))
    interaction = Interaction(gradients, target, _geometry(learner))
    clock.lap("score")
    decision = learner.selector.decide(interaction)
    weights_N = _final_weights(learner, decision, samples)
    clock.lap("weigh")
    result, norm, rate = _update(learner, gradients, weights_N)
    clock.lap("update")
    if result != APPLIED:
        weights_N = torch.zeros_like(weights_N)
    return StepReport(
        result=result,
        candidates=tuple(candidates),
        losses=tuple(gradients.losses_N.tolist()),
        weights=tuple(weights_N.tolist()),
        decision=decision,
        gradient_norm=norm,
        learning_rate=rate,
        target_refreshed=refreshed,
        seconds=clock.seconds,
    )


def _draw(learner: Learner, num_samples: int) -> list[int]:
    if learner.selection.weigh == "uniform":
        return draw_uniform(num_samples, learner.selection.chosen, learner.generator)
    return list(range(num_samples))


def _geometry(learner: Learner) -> Geometry:
    if optimizer_steps(learner.optimizer) < learner.selection.settle_steps:
        return plain
    return adam_geometry(learner.optimizer, learner.capture.parameters)


def _final_weights(learner: Learner, decision: Decision, samples: Sequence[Sample]) -> Tensor:
    """The decision's coefficients times what the producer says a sample counts, with a sum of 1 again."""
    weights_N = decision.weights_N
    if not decision.chosen and learner.selection.when_none_helps == "uniform":
        drawn = draw_uniform(len(samples), learner.selection.chosen, learner.generator)
        weights_N = equal_weights(len(samples), drawn)
    # In float64, and the largest first scaled to one: a producer may state any finite weight.
    scaled_N = weights_N.double() * torch.tensor([sample.weight for sample in samples], dtype=torch.float64)
    if not bool((scaled_N > 0).any()):
        return weights_N
    scaled_N /= scaled_N.max()
    return (scaled_N / scaled_N.sum()).float()


def _update(learner: Learner, gradients: PoolGradients, weights_N: Tensor) -> tuple[str, float, float]:
    """Book-keep the weighted gradient, clip it, take one optimizer step. Returns result, norm and learning rate."""
    if not bool((weights_N > 0).any()):
        # Selectors never choose a sample whose loss is not finite; where none is, it is the model that is broken.
        sound = bool(gradients.losses_N.isfinite().any())
        return SKIPPED_NONE_HELPS if sound else SKIPPED_NONFINITE, math.nan, math.nan
    parameters = learner.capture.parameters
    try:
        for name in gradients.factors:
            parameters[name].grad = gradients.weighted_gradient_of(name, weights_N)
        limit = learner.optimization.clip_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), limit))
        if not math.isfinite(norm):
            return SKIPPED_NONFINITE, norm, math.nan
        rate = learning_rate(learner.optimization, optimizer_steps(learner.optimizer))
        for group in learner.optimizer.param_groups:
            group["lr"] = rate
        learner.optimizer.step()
        return APPLIED, norm, rate
    finally:
        learner.optimizer.zero_grad(set_to_none=True)


class _Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = now - self._last
        self._last = now
