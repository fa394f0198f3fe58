"""The stages of the selection as the page shows them: what draws, what routes, what masks. Only those that are on."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from gradient_selectors import SelectionEngine
from gradient_selectors.capture.gradients import layer_of
from gradient_selectors.draw.auto import AutoDraw
from gradient_selectors.features.traits import embeddings_of

from stream_trainer.monitoring.groups.draws import DrawMetrics
from stream_trainer.records import Sample
from stream_trainer.training.draw.pools import PoolSampler
from stream_trainer.training.draw.waiting import BanditSampler, LearnedSampler
from stream_trainer.training.live.pools import TextOf, label_of, shown_text

NEAREST = 3  # samples shown of each arm


def arms_of(sampler: PoolSampler, pulls: Mapping[int, int]) -> list[dict[str, Any]] | None:
    """The bandit's arms: their rewards, how often each was drawn from, and the waiting samples nearest to each.

    Samples stand there as they are, for whoever shows them to decide what may be seen.
    """
    if not isinstance(sampler, BanditSampler):
        return None
    bandit, room = sampler.bandit, sampler.room
    nearest: list[list[Sample]] = [[] for _ in bandit.moments.means_K]
    if room.samples:
        likeness_KM = bandit.clusters.centres_Kd @ embeddings_of(room.traits).float().T
        best_Kn = likeness_KM.topk(min(NEAREST, len(room.samples)), dim=1).indices
        nearest = [[room.samples[i] for i in row] for row in best_Kn.tolist()]
    columns = zip(bandit.moments.means_K.tolist(), bandit.uncertainty_K().tolist(), nearest, strict=True)
    return [
        {"arm": arm, "mean": mean, "deviation": deviation, "pulls": pulls.get(arm, 0), "nearest": samples}
        for arm, (mean, deviation, samples) in enumerate(columns)
    ]


def arms_as_json(arms: list[dict[str, Any]], text_of: TextOf | None) -> list[dict[str, Any]]:
    """The arms with their samples as a browser gets them."""
    return [arm | {"nearest": [_shown(sample, text_of) for sample in arm["nearest"]]} for arm in arms]


def _shown(sample: Sample, text_of: TextOf | None) -> dict[str, Any]:
    shown = {"partition": str(sample.partition), "offset": sample.offset, "id": sample.id, "label": label_of(sample)}
    return shown if text_of is None else shown | {"text": shown_text(sample.input_ids, text_of)}


def learned_of(sampler: PoolSampler, shown: DrawMetrics) -> dict[str, Any] | None:
    """What the learned draw thinks of each feature, and how sure it is, as its metrics have it."""
    if not isinstance(sampler, LearnedSampler):
        return None
    learned, deviations = sampler.learned, shown.coefficient_deviation.by_labels
    return {
        "features": [
            {"name": labels[0], "coefficient": coefficient, "deviation": deviations[labels]}
            for labels, coefficient in shown.coefficient.by_labels.items()
        ],
        "explained": learned.explained,
        "interval": learned.interval,
        "way": sampler.draw.way if isinstance(sampler.draw, AutoDraw) else None,
    }


def mask_of(engine: SelectionEngine) -> dict[str, Any] | None:
    """Share of the weights that may move, by layer and module."""
    densities: dict[str, tuple[int, int]] | None = getattr(engine.optimizer, "densities", None)
    if densities is None:
        return None
    kept, total = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for name, (some, all_of_them) in densities.items():
        place = layer_of(name), _module_of(name)
        kept[place] += some
        total[place] += all_of_them
    layers, modules = (list(dict.fromkeys(place[i] for place in total)) for i in (0, 1))
    return {
        "layers": layers,
        "modules": modules,
        "density": [[_share(kept, total, layer, module) for module in modules] for layer in layers],
        "overall": kept.total() / max(1, total.total()),
        "age": None if engine.mask is None else engine.mask.age,
    }


def _module_of(name: str) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj.weight`."""
    return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]


def _share(kept: Counter[Any], total: Counter[Any], layer: str, module: str) -> float | None:
    place = layer, module
    return kept[place] / total[place] if place in total else None
