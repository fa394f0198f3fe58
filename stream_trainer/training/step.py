"""One step as a function: a pool of candidates in, one update and a report out."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from gradient_selectors import Decision, SelectionEngine
from gradient_selectors.mask.masked_adamw import MaskChange
from gradient_selectors.preconditioner import optimizer_steps
from gradient_selectors.target import TargetError
from gradient_selectors.views.advantage import Comparison

from stream_trainer.errors import SettingsError, TrainingError
from stream_trainer.ingest.letter import DETAIL_CHARS
from stream_trainer.models.refusals import first_line
from stream_trainer.records import Sample
from stream_trainer.samples.collate import collate
from stream_trainer.settings.schema import OptimizerSettings
from stream_trainer.training.draw.shadow import Effects, Shadow, Trial
from stream_trainer.training.optimizer import learning_rate

APPLIED, SKIPPED_NONFINITE, SKIPPED_NONE_HELPS = "applied", "skipped_nonfinite", "skipped_none_helps"
SKIPPED_FAILED = "skipped_failed"  # no sample of the pool could be used


@dataclass(frozen=True)
class StepReport:
    """What a step did.

    Attributes:
        result: one of `metrics.STEP_RESULTS`.
        losses: loss of each candidate before the update (nats per token).
        coefficients: of each candidate in the update, the mean over layers if they differ; all zero if it was skipped.
        decision: what the selector said.
        utilities: `Interaction.relative_utilities_N`, if the draw learns from them.
        alignments: of each candidate's gradient with the target's, as inner products, if the decision needed them.
        gradient_norm: length of the gradient before clipping.
        target_refused: whether a refresh of the target's gradient was not finite: the one before was used.
        mask_change: what a refresh of the mask changed, or None if there was none.
        comparison: of the update with a uniform one, if it was asked for.
        effects: measured ones, of the update and of a uniform one, if they were asked for.
        seconds: time by phase; `shadow` is that of the effects.
    """

    result: str
    losses: tuple[float, ...]
    coefficients: tuple[float, ...]
    decision: Decision
    utilities: tuple[float, ...] | None = None
    alignments: tuple[float, ...] | None = None
    gradient_norm: float = math.nan
    learning_rate: float = math.nan
    target_refreshed: bool = False
    target_refused: bool = False
    mask_change: MaskChange | None = None
    comparison: Comparison | None = None
    effects: Effects | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def selected(self) -> tuple[int, ...]:
        """Indices into the pool of the samples that entered the update."""
        return tuple(i for i, coefficient in enumerate(self.coefficients) if coefficient > 0)

    @property
    def own_seconds(self) -> float:
        """What the step itself took, without what was only measured beside it."""
        return sum(spent for phase, spent in self.seconds.items() if phase != "shadow")


def train_step(
    engine: SelectionEngine,
    pool: Sequence[Sample],
    pad_id: int,
    settings: OptimizerSettings,
    *,
    scores: bool = True,
    rival: torch.Generator | None = None,
    shadow: Shadow | None = None,
) -> StepReport:
    """Score the pool, decide, update once; without `scores`, train on all of it. The pool is not empty.

    With `rival`, compare the update with one of samples that it draws; with `shadow`, measure the effects of both.

    A step whose gradient is not finite changes nothing and says so in the report. Raises SettingsError if that is the
    target's own, and there is no older one; TrainingError if the optimizer fails; and whatever model and selector
    raise. No weight has changed then.
    """
    batch = collate(pool, pad_id)
    try:
        decision = engine.backward(batch, rival=rival) if scores else engine.train(batch)
    except TargetError as error:
        raise SettingsError(f"target.path: {error}") from error
    found = engine.last
    assert found is not None
    started = time.perf_counter()
    update = _update(engine, decision, settings, shadow, pad_id)
    beside = {} if update.effects is None else {"shadow": update.effects.seconds}
    updating = found.seconds.get("update", 0.0) + time.perf_counter() - started - beside.get("shadow", 0.0)
    seconds = {**found.seconds, "update": updating, **beside}
    by_layer = decision.coefficients_LN
    coefficients_N = decision.coefficients_N if by_layer is None else by_layer.mean(0)
    applied = update.result == APPLIED
    return StepReport(
        result=update.result,
        losses=tuple(found.losses_N.tolist()),
        coefficients=tuple(coefficients_N.tolist()) if applied else (0.0,) * len(pool),
        decision=decision,
        utilities=None if found.utilities_N is None else tuple(found.utilities_N.tolist()),
        alignments=None if found.alignments_N is None else tuple(found.alignments_N.tolist()),
        gradient_norm=update.gradient_norm,
        learning_rate=update.learning_rate,
        target_refreshed=found.target_refreshed,
        target_refused=found.target_refused,
        mask_change=found.mask_change,
        comparison=found.comparison,
        effects=update.effects,
        seconds=seconds,
    )


@dataclass(frozen=True)
class _Update:
    result: str
    gradient_norm: float = math.nan
    learning_rate: float = math.nan
    effects: Effects | None = None


def _update(
    engine: SelectionEngine, decision: Decision, settings: OptimizerSettings, shadow: Shadow | None, pad_id: int
) -> _Update:
    """Clip the gradient that the engine left, and take one optimizer step."""
    if not decision.selected:
        # Selectors never select a sample whose loss is not finite; where none is, it is the model that is broken.
        sound = bool(engine.losses_N.isfinite().any())
        return _Update(SKIPPED_NONE_HELPS if sound else SKIPPED_NONFINITE)
    try:
        limit = settings.clip_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(engine.capture.parameters.values(), limit))
        if not math.isfinite(norm):
            return _Update(SKIPPED_NONFINITE, norm)
        rate = learning_rate(settings, optimizer_steps(engine.optimizer))
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        trial = None if shadow is None else Trial(engine, shadow, len(decision.selected), pad_id)
        _apply(engine.optimizer)
        return _Update(APPLIED, norm, rate, None if trial is None else trial.chosen())
    finally:
        engine.optimizer.zero_grad(set_to_none=True)


def _apply(optimizer: torch.optim.Optimizer) -> None:
    """One step of the optimizer. An error in the midst of it leaves some weights moved and others not."""
    try:
        optimizer.step()
    except Exception as error:  # of torch, of bitsandbytes, of the device
        what = f"{type(error).__name__}: {first_line(error)[:DETAIL_CHARS]}"
        raise TrainingError(
            f"the optimizer failed in the midst of an update ({what}); start again from the last checkpoint, with more "
            "memory or with model.lora"
        ) from error
