"""Single steps without a stream: samples, and all that a step works with, put together as the service does it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gradient_selectors import MaskedAdamW, SelectionEngine
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.target import Target, mean_loss
from torch import Tensor

from stream_trainer.models.loading import LoadedModel, load_model
from stream_trainer.records import Partition, Sample
from stream_trainer.samples.collate import collate
from stream_trainer.settings.schema import ModelSettings, Settings
from stream_trainer.training.build import make_engine
from stream_trainer.training.optimizer import NamedAdamW, make_optimizer
from stream_trainer.training.step import StepReport, train_step
from tests.helpers.service import configuration, jsonl
from tests.helpers.tiny_models import shake


def make_samples(count: int, seed: int = 0, weight: float = 1.0) -> list[Sample]:
    """Random tokens, the first two of each sample without loss."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for i in range(count):
        length = int(torch.randint(6, 14, (), generator=generator))
        ids = tuple(torch.randint(3, 300, (length,), generator=generator).tolist())
        samples.append(Sample(ids, (-100, -100, *ids[2:]), Partition("stream", 0), i, length, weight=weight))
    return samples


@dataclass(frozen=True)
class Setup:
    """What a step works with."""

    settings: Settings
    loaded: LoadedModel
    optimizer: NamedAdamW | MaskedAdamW
    engine: SelectionEngine

    def step(self, pool: Sequence[Sample]) -> StepReport:
        return train_step(self.engine, pool, self.pad_id, self.settings.optimizer)

    def loss(self, samples: Sequence[Sample]) -> float:
        return mean_loss(self.capture, [collate(samples, self.pad_id)])

    @property
    def pad_id(self) -> int:
        return int(self.loaded.tokenizer.pad_token_id)

    @property
    def capture(self) -> GradientCapture:
        return self.engine.capture

    @property
    def parameters(self) -> dict[str, Tensor]:
        return dict(self.capture.parameters)

    @property
    def masked(self) -> MaskedAdamW:
        assert isinstance(self.optimizer, MaskedAdamW)
        return self.optimizer

    @property
    def target(self) -> Target:
        assert self.engine.target is not None
        return self.engine.target


def put_together(
    settings: Settings, loaded: LoadedModel, target: Sequence[Sample], anchors: Sequence[Sample] = ()
) -> Setup:
    """In the service's order, but for the stream and a checkpoint."""
    optimizer = make_optimizer(loaded.model, settings.optimizer, settings.selection)
    return Setup(settings, loaded, optimizer, make_engine(settings, loaded, optimizer, target, anchors))


def make_setup(
    model: ModelSettings,
    target: Sequence[Sample] | None = None,
    optimizer: dict[str, Any] | None = None,
    **selection: Any,
) -> Setup:
    """Steps on a model whose every weight, norms and adapters too, is away from its initial value.

    The learning rate is large, nothing is clipped, and the target is refreshed every two steps, from all of it.
    """
    settings = Settings.model_validate(
        {
            "source": {"kind": "jsonl", "jsonl": {"path": "none.jsonl"}},
            "model": model,
            "target": {"path": "none.jsonl", "refresh_steps": 2, "refresh_samples": 5, "decay": 0.0},
            "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1, "clip_norm": None, **(optimizer or {})},
            "selection": {"profile": "thorough", **selection},
        }
    )
    loaded = load_model(model, seed=0)
    shake(loaded.model)
    return put_together(settings, loaded, make_samples(5, seed=99) if target is None else target)


def setup_of(folder: Path, selection: dict[str, Any], anchors: Sequence[Sample] = (), **sections: Any) -> Setup:
    """Steps of a run of the service (`service.configuration`)."""
    settings = Settings(**configuration(folder, jsonl(folder / "none.jsonl"), selection=selection, **sections))
    loaded = load_model(settings.model, settings.training.seed)
    return put_together(settings, loaded, make_samples(4, seed=99), anchors)
