"""What the settings of the draw stand for: the sampler of pools."""

import importlib
from collections.abc import Sequence
from typing import Any, Literal, assert_never, cast

import torch
from gradient_selectors import ClusterUcb, SelectionEngine, StreamOptions
from gradient_selectors.draw.auto import AutoDraw
from gradient_selectors.draw.dsir import Dsir
from gradient_selectors.draw.knn_kde import KnnKde
from gradient_selectors.draw.learned import LearnedDraw, LearnedOptions
from gradient_selectors.draw.nearest import Nearest, NearRandom
from gradient_selectors.draw.stream_draw import StreamDraw
from gradient_selectors.features.columns import Columns, ColumnTable
from gradient_selectors.features.embeddings import EmbeddingFeatures
from gradient_selectors.features.ngrams import NgramImportance
from gradient_selectors.features.traits import OwnFeatures, Traits, describe, embeddings_of
from torch import Tensor

from stream_trainer.errors import SettingsError
from stream_trainer.ingest.buffer import Buffer
from stream_trainer.models.loading import LoadedModel
from stream_trainer.records import Sample
from stream_trainer.samples.collate import collate
from stream_trainer.settings.schema import Settings
from stream_trainer.settings.selection import PREDICTS, ClusterUcbSettings, LearnedSettings, SelectionSettings
from stream_trainer.training.build import Generators
from stream_trainer.training.draw.paying import Paying, RestingSampler
from stream_trainer.training.draw.pools import LossSampler, PoolSampler, SequentialSampler, UniformSampler
from stream_trainer.training.draw.waiting import BanditSampler, LearnedSampler, RivalSampler, WaitingRoom

MICRO_BATCH = 16  # samples of a forward pass


def make_sampler(
    settings: Settings, buffer: Buffer, loaded: LoadedModel, engine: SelectionEngine, target: Sequence[Sample]
) -> PoolSampler:
    """What hands out the steps' pools. To be made before a checkpoint is restored: features stay as they are then.

    Raises SettingsError if a feature of the user's own cannot be loaded or does not fit.
    """
    selection, wait_s = settings.selection, settings.buffer.wait_s
    match selection.draw:
        case "all":
            return SequentialSampler(buffer, selection.num_drawn, wait_s)
        case "uniform":
            generator = Generators.of(settings.training.seed).uniform
            return UniformSampler(buffer, selection.pool_size, selection.num_drawn, wait_s, generator)
        case "lowest_loss" | "middle_loss":
            rank: Literal["lowest", "middle"] = "lowest" if selection.draw == "lowest_loss" else "middle"
            losses = _losses(engine, int(loaded.tokenizer.pad_token_id))
            return LossSampler(buffer, selection.pool_size, selection.num_drawn, wait_s, rank, losses)
        case "learned" | "auto" | "cluster_ucb" | "nearest" | "near_random" | "knn_kde" | "dsir":
            return _waiting_sampler(settings, buffer, loaded, target)
        case _:
            assert_never(selection.draw)


def make_paying(settings: Settings) -> Paying:
    """What finds out whether selection pays. The learned draw's probes compare by themselves."""
    selection, generators = settings.selection, Generators.of(settings.training.seed)
    options = selection.advantage
    if selection.draw in PREDICTS:
        options = options.model_copy(update={"every_steps": None})
    return Paying(options, generators.paying)


def resting(sampler: PoolSampler, paying: Paying, settings: Settings) -> PoolSampler:
    """The sampler, which rests while selection does not pay if that is asked for."""
    selection = settings.selection
    if selection.advantage.when_not_paying == "keep":
        return sampler
    return RestingSampler(sampler, paying, selection.batch_size, Generators.of(settings.training.seed).resting)


def _losses(engine: SelectionEngine, pad_id: int) -> Any:
    def of(part: Sequence[Sample]) -> Tensor:
        try:
            return engine.capture.losses(collate(part, pad_id)).cpu()
        except Exception:  # the model's own: whatever a sample makes it raise
            if len(part) == 1:
                return torch.tensor([torch.nan])  # should it be drawn all the same, the step finds out why
        return torch.cat([of([sample]) for sample in part])

    def losses(samples: Sequence[Sample]) -> Tensor:
        parts = [samples[start : start + MICRO_BATCH] for start in range(0, len(samples), MICRO_BATCH)]
        return torch.cat([of(part) for part in parts])

    return losses


def _waiting_sampler(
    settings: Settings, buffer: Buffer, loaded: LoadedModel, target: Sequence[Sample]
) -> BanditSampler | LearnedSampler | RivalSampler:
    selection, seed = settings.selection, settings.training.seed
    features, own = EmbeddingFeatures.of_model(loaded.model), own_features(selection)
    traits = _described(target, features, own)

    def described(samples: Sequence[Sample]) -> list[Traits]:
        return _described(samples, features, own)

    room = WaitingRoom(buffer, described, selection.waiting, selection.intake, settings.buffer.wait_s)
    if selection.draw == "cluster_ucb":
        options = stream_options(selection.cluster_ucb, selection.batch_size)
        return BanditSampler(room, ClusterUcb(options, seed, embeddings_of(traits).mean(0)), selection.num_drawn)
    if selection.draw in PREDICTS:
        return LearnedSampler(room, selection.draw, _taught(selection, traits, seed))
    return RivalSampler(room, selection.draw, _rival(selection, traits, Generators.of(seed).draw), selection.num_drawn)


def _taught(selection: SelectionSettings, target: Sequence[Traits], seed: int) -> LearnedDraw | AutoDraw:
    table = ColumnTable(columns_of(selection.learned, len(target[0].own_f)), target)
    if selection.draw == "learned":
        return LearnedDraw(learned_options(selection), table, seed)
    rival = _near_random(selection, embeddings_of(target), Generators.of(seed).draw)
    learned = LearnedDraw(learned_options(selection), table, seed, rival)
    return AutoDraw(learned, rival, selection.pool_size, selection.batch_size, seed)


def _near_random(selection: SelectionSettings, targets_Td: Tensor, generator: torch.Generator) -> NearRandom:
    return NearRandom(targets_Td.mean(0), generator, selection.rivals.share, selection.rivals.copies)


def _described(samples: Sequence[Sample], features: EmbeddingFeatures, own: OwnFeatures | None) -> list[Traits]:
    try:
        return describe(samples, features, own)
    except (ValueError, TypeError) as error:
        raise SettingsError(
            f"selection.learned.features: your own features cannot be used ({error}); return an array of numbers with "
            "a row for each sample"
        ) from error


def _rival(selection: SelectionSettings, target: Sequence[Traits], generator: torch.Generator) -> StreamDraw:
    targets_Td = embeddings_of(target)
    match selection.draw:
        case "nearest":
            return Nearest(targets_Td.mean(0))
        case "near_random":
            return _near_random(selection, targets_Td, generator)
        case "knn_kde":
            return KnnKde(targets_Td, generator)
        case _:
            return Dsir(NgramImportance([traits.tokens for traits in target]), generator)


def own_features(selection: SelectionSettings) -> OwnFeatures | None:
    """The user's own function, if one is named. Raises SettingsError if it cannot be imported."""
    named = [name for name in selection.learned.features if ":" in name]
    if selection.draw not in PREDICTS or not named:
        return None
    setting = f"selection.learned.features={named[0]}"
    module, _, name = named[0].partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # the user's own code may raise anything
        raise SettingsError(
            f"{setting} cannot be imported ({type(error).__name__}: {error}); put it on the PYTHONPATH"
        ) from None
    if not callable(function):
        raise SettingsError(f"{setting} is no function; name one from samples to an array with a row for each")
    return cast(OwnFeatures, function)


def columns_of(settings: LearnedSettings, num_own: int) -> Columns:
    """The columns that the settings ask for; `num_own` is how many the user's own function makes."""
    asked = set(settings.features)
    own = next((name for name in settings.features if ":" in name), "")
    return Columns(
        likeness="likeness" in asked,
        ngrams="ngrams" in asked,
        fluency="fluency" in asked,
        copy="copy" in asked,
        length="length" in asked,
        components=Columns.components if "components" in asked else 0,
        values=Columns.values if "fields" in asked and settings.fields else 0,
        own=tuple(f"{own} {i}" for i in range(num_own)),
    )


def learned_options(selection: SelectionSettings) -> LearnedOptions:
    """The options of the learned draw."""
    learned = selection.learned
    return LearnedOptions(
        batch_size=selection.batch_size,
        probe_size=selection.pool_size,
        probe_every=learned.probe_every,
        max_probe_every=learned.max_probe_every,
        discount=learned.discount,
        precision=learned.prior,
        temperature=learned.temperature,
        loss_weight=learned.loss_weight,
    )


def stream_options(settings: ClusterUcbSettings, batch_size: int) -> StreamOptions:
    """The bandit's options; shrinkage and the clusters' memory stay as simulated.

    One arm may fill as many slots of a pool as an update takes, so that all of it can come from the best one. If it
    could fill more, an arm of the wrong kind could fill a whole pool, and the update would have no better samples.
    """
    return StreamOptions(
        num_clusters=settings.clusters,
        beta=settings.beta,
        discount=settings.discount,
        explore=settings.explore,
        prior=settings.prior,
        thompson=settings.thompson,
        per_arm=batch_size,
    )
