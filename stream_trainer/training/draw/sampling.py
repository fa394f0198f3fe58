"""What the settings of the draw stand for: the sampler of pools."""

from collections.abc import Sequence
from typing import Any, Literal, assert_never

import torch
from gradient_selectors import ClusterUcb, SelectionEngine, StreamOptions
from gradient_selectors.draw.auto import AutoDraw
from gradient_selectors.draw.dsir import Dsir
from gradient_selectors.draw.knn_kde import KnnKde
from gradient_selectors.draw.learned import LearnedDraw, LearnedOptions
from gradient_selectors.draw.nearest import Nearest, NearRandom
from gradient_selectors.draw.stream_draw import StreamDraw
from gradient_selectors.features.columns import SIMPLE, Columns, ColumnTable
from gradient_selectors.features.embeddings import EmbeddingFeatures
from gradient_selectors.features.ngrams import NgramImportance
from gradient_selectors.features.traits import Traits, embeddings_of
from torch import Tensor

from stream_trainer.errors import TrainingError
from stream_trainer.ingest.buffer import Buffer
from stream_trainer.models.loading import LoadedModel
from stream_trainer.records import Sample
from stream_trainer.samples.collate import collate
from stream_trainer.settings.schema import Settings
from stream_trainer.settings.sections.selection import PREDICTS, ClusterUcbSettings, LearnedSettings, SelectionSettings
from stream_trainer.training.build import Generators, make_budget
from stream_trainer.training.draw.paying import Paying, RestingSampler, Shadows
from stream_trainer.training.draw.pools import LossSampler, PoolSampler, SequentialSampler, UniformSampler
from stream_trainer.training.draw.sides import Sides
from stream_trainer.training.draw.waiting import BanditSampler, LearnedSampler, RivalSampler, WaitingRoom
from stream_trainer.training.faults.culprits import Failure
from stream_trainer.training.faults.own_features import Accuse, describe_sound, describe_target, load_own_features

MICRO_BATCH = 16  # samples of a forward pass


def _refuse(sample: Sample, failure: Failure) -> None:
    raise TrainingError(f"{sample.partition} offset {sample.offset}: {failure.detail}; correct your own features")


def make_sampler(
    settings: Settings,
    buffer: Buffer,
    loaded: LoadedModel,
    engine: SelectionEngine,
    target: Sequence[Sample],
    accuse: Accuse = _refuse,
) -> PoolSampler:
    """What hands out the steps' pools. To be made before a checkpoint is restored: features stay as they are then.

    `accuse` takes a sample that features of the user's own fail on out of the stream. Raises SettingsError if these
    cannot be loaded or do not fit.
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
            return _waiting_sampler(settings, buffer, loaded, target, accuse)
        case _:
            assert_never(selection.draw)


def make_paying(settings: Settings, held: Sequence[Sample]) -> Paying:
    """What finds out whether selection pays. The learned draw's probes compare by themselves.

    `held`: the samples of the target that are held back.
    """
    selection, generators = settings.selection, Generators.of(settings.training.seed)
    options = selection.advantage
    if selection.draw in PREDICTS:
        options = options.model_copy(update={"every_steps": None})
    if options.shadow_every is None:
        return Paying(options, generators.paying)
    sides, micro_tokens = [Sides(options.window) for _ in range(2)], make_budget(settings).micro_tokens
    shadows = Shadows(options.shadow_every, held, generators.shadow, micro_tokens, *sides)
    return Paying(options, generators.paying, shadows)


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
    settings: Settings, buffer: Buffer, loaded: LoadedModel, target: Sequence[Sample], accuse: Accuse
) -> BanditSampler | LearnedSampler | RivalSampler:
    selection, seed = settings.selection, settings.training.seed
    features, own = EmbeddingFeatures.of_model(loaded.model), load_own_features(selection)
    traits = describe_target(target, features, own)

    def described(samples: Sequence[Sample]) -> list[Traits | None]:
        return describe_sound(samples, features, own, accuse)

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


def columns_of(settings: LearnedSettings, num_own: int) -> Columns:
    """The columns that the settings ask for; `num_own` is how many the user's own function makes."""
    asked = set(settings.features)
    own = next((name for name in settings.features if ":" in name), "")
    return Columns(
        simple=tuple(name for name in SIMPLE if name in asked),
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
        # Before the first steps Adam has no moments, so utilities would be those of plain gradients, and the prior
        # draws as well. Only a mask cannot wait: no weight moves before it is chosen, in a probe.
        first_probe=0 if selection.mask == "dual_sft" else learned.probe_every,
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
