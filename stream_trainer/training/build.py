"""What the settings stand for: the engine with its selector, scoring, route and mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never, cast

import torch
from gradient_selectors import (
    DualSft,
    Equal,
    Exact,
    FilterThenWeight,
    Gast,
    GradientCapture,
    Greedy,
    MaskRule,
    RankOne,
    SelectionEngine,
    Selector,
    Sketched,
    TopK,
    UnsupportedParameterError,
)
from gradient_selectors.mask.dual_sft import Anchors, Response
from gradient_selectors.target import Target
from gradient_selectors.views.pieces import Budget
from gradient_selectors.views.scoring import Scoring
from gradient_selectors.weigh.baselines import OrUniform
from gradient_selectors.weigh.coefficients import CoefficientSolver
from gradient_selectors.weigh.selector import needs_target
from gradient_selectors.world.base import World

from stream_trainer.errors import SettingsError
from stream_trainer.models.limits import check_length
from stream_trainer.models.loading import LoadedModel
from stream_trainer.records import Sample
from stream_trainer.samples.collate import collate
from stream_trainer.settings.schema import Settings
from stream_trainer.settings.sections.selection import PREDICTS, BuiltInWeigh, DualSftSettings, SelectionSettings
from stream_trainer.training.own_selector import load_selector


@dataclass(frozen=True)
class Generators:
    """Sources of every random choice, on the CPU. Each part draws from its own: one is as it is without the others."""

    uniform: torch.Generator
    route: torch.Generator
    scoring: torch.Generator
    fallback: torch.Generator
    selector: torch.Generator
    draw: torch.Generator
    paying: torch.Generator
    resting: torch.Generator
    shadow: torch.Generator

    @classmethod
    def of(cls, seed: int) -> "Generators":
        return cls(*(torch.Generator().manual_seed(seed + i) for i in range(9)))


def make_capture(settings: Settings, loaded: LoadedModel) -> GradientCapture:
    """What is attached to the model. Raises SettingsError if a trainable parameter is not covered exactly."""
    if loaded.max_positions is None:
        check_length(loaded.model, settings.samples.max_tokens)
    try:
        return GradientCapture(loaded.model, loaded.autocast_dtype)
    except UnsupportedParameterError as error:
        raise SettingsError(f"model.name={settings.model.name}: {error}; or set model.lora") from error


def make_engine(
    settings: Settings,
    loaded: LoadedModel,
    optimizer: torch.optim.Optimizer,
    target: Sequence[Sample],
    anchors: Sequence[Sample] = (),
    world: World | None = None,
    capture: GradientCapture | None = None,
) -> SelectionEngine:
    """The engine over the model and its optimizer. To be made before a checkpoint is restored.

    `capture`: what is attached to the model already. Raises SettingsError if a trainable parameter of the model is not
    covered exactly, or a selector of the user's own cannot be made.
    """
    selection, pad_id = settings.selection, loaded.tokenizer.pad_token_id
    generators = Generators.of(settings.training.seed)
    selector, route = make_selector(selection, generators), make_route(selection, generators)
    mask = _make_mask(settings, loaded, anchors) if selection.mask == "dual_sft" else None
    learns = selection.learns
    is_steered = needs_target(selector) or route is not None or mask is not None or learns
    steps = settings.target
    # A probe comes seldom, and what it finds is used for long: its target is fresh.
    refresh_steps = 1 if selection.draw in PREDICTS else steps.refresh_steps
    options = {"refresh_steps": refresh_steps, "refresh_samples": steps.refresh_samples, "decay": steps.decay}
    budget = make_budget(settings)
    return SelectionEngine(
        make_capture(settings, loaded) if capture is None else capture,
        optimizer,
        selector,
        target=Target.of([collate(target, pad_id)], **options) if is_steered else None,
        scoring=make_scoring(selection, generators),
        route=route,
        mask=mask,
        preconditioner_warmup_steps=selection.preconditioner_warmup_steps,
        reports_utilities=learns,
        micro_tokens=budget.micro_tokens,
        factors_bytes=budget.factors_bytes,
        world=world,
    )


def split_target(settings: Settings, samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """The samples of the target that steer, and those held back. Raises SettingsError if none would steer."""
    count = settings.target.held_back
    if count >= len(samples):
        raise SettingsError(
            f"target.held_back={count} leaves none of the {len(samples)} samples of target.path to steer; lower it"
        )
    return [*samples[: len(samples) - count]], [*samples[len(samples) - count :]]


def make_budget(settings: Settings) -> Budget:
    """What a pass may take: anything, where scoring needs all factors of the whole pool."""
    if settings.selection.scoring == "rank_one":
        return Budget()
    gigabytes = settings.memory.factors_gb
    return Budget(settings.selection.micro_tokens, None if gigabytes is None else int(gigabytes * 1e9))


def make_selector(settings: SelectionSettings, generators: Generators) -> Selector:
    """The selector that weighs. Raises SettingsError if one of the user's own cannot be made."""
    selector = _make_weigher(settings, generators)
    if settings.when_none_helps == "uniform":
        return OrUniform(selector, settings.batch_size, generators.fallback)
    return selector


def _make_weigher(settings: SelectionSettings, generators: Generators) -> Selector:
    if ":" in settings.weigh:
        return load_selector(settings, generators.selector)
    weigh = cast(BuiltInWeigh, settings.weigh)
    match weigh:
        case "filter_then_weight":
            return _filter_then_weight(settings)
        case "greedy":
            return Greedy(settings.batch_size, settings.greedy.keep_ratio)
        case "top_k":
            return TopK(settings.batch_size)
        case "equal":
            return Equal()
        case _:
            assert_never(weigh)


def _filter_then_weight(settings: SelectionSettings) -> FilterThenWeight:
    method = settings.filter_then_weight
    return FilterThenWeight(
        batch_size=settings.batch_size,
        keep_ratio=method.keep_ratio,
        solver=CoefficientSolver(method.solver_max_iterations),
        ridge=method.ridge,
        cap=method.max_coefficient,
        filter=method.filter,
        metric=method.metric,
        gamma=method.gamma,
        normalisation=method.normalisation,
        min_gain=method.min_gain,
    )


def make_route(settings: SelectionSettings, generators: Generators) -> Gast | None:
    """What draws the samples of each layer, if anything does."""
    match settings.route:
        case "none":
            return None
        case "gast":
            gast = settings.gast
            return Gast(gast.per_layer, generators.route, gast.rule, gast.temperature)
        case _:
            assert_never(settings.route)


def make_scoring(settings: SelectionSettings, generators: Generators) -> Scoring:
    """How utilities and redundancy are computed."""
    match settings.scoring:
        case "exact":
            return Exact()
        case "rank_one":
            return RankOne()
        case "sketched":
            return Sketched(settings.sketch_width, generators.scoring)
        case _:
            assert_never(settings.scoring)


def make_response(settings: DualSftSettings, learning_rate: float) -> Response:
    """The weights of the terms of u; the learning rate weighs that of the curvature."""
    curvature_rate = learning_rate if settings.second_order else 0.0
    return Response(curvature_rate, settings.lambda_new, settings.lambda_prior, settings.lambda_anchor)


def _make_mask(settings: Settings, loaded: LoadedModel, anchors: Sequence[Sample]) -> DualSft:
    method = settings.selection.dual_sft
    response = make_response(method, settings.optimizer.learning_rate)
    rule = MaskRule(method.density, method.granularity, method.absolute, method.layer_quota, method.module_quota)
    batches = [collate(anchors, loaded.tokenizer.pad_token_id)] if anchors else []
    kept = Anchors.of(loaded.model, batches, response) if batches else None
    return DualSft(rule, response, method.refresh_steps, method.decay, kept)
