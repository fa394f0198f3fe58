"""Ranks exchange as often on a deep model as on a flat one: what is small goes together."""

from collections import Counter
from typing import Any

import pytest
import torch
from gradient_selectors.engine import SelectionEngine
from gradient_selectors.target import Target
from gradient_selectors.views.interaction import Interaction
from gradient_selectors.views.scoring import Exact
from gradient_selectors.views.sketches import Sketched
from gradient_selectors.weigh.filter_then_weight import FilterThenWeight
from gradient_selectors.world import buckets
from gradient_selectors.world.base import World
from gradient_selectors.world.buckets import summed_in_buckets
from torch import Tensor

from stream_trainer.models.loading import load_model
from tests.gradient_selectors.world.threads import ThreadWorld, on_ranks, without_locks
from tests.helpers.oracle import make_batch
from tests.helpers.tiny_models import shake, with_config

SIZES = {"a": (3, 4), "b": (5,), "c": (40,), "d": (2,), "e": (6,), "half": (7,), "f": (1, 9)}


def part(name: str, rank: int) -> Tensor:
    values = torch.randn(SIZES[name], generator=torch.Generator().manual_seed(len(name) + 10 * rank))
    return values.half() if name == "half" else values


def test_each_sum_is_of_its_own_tensor_whatever_goes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "BUCKET_ELEMENTS", 20)

    def work(world: ThreadWorld) -> tuple[dict[str, Tensor], list[Any]]:
        found = dict(summed_in_buckets(world, ((name, part(name, world.rank)) for name in SIZES)))
        return found, [shape for _, shape, _ in world.calls]

    for found, shapes in on_ranks(2, work):
        assert list(found) == list(SIZES)
        for name, total in found.items():
            assert torch.equal(total, part(name, 0) + part(name, 1))
        # Large ones by themselves and in their own place; another dtype by itself.
        assert shapes == [(17,), (40,), (8,), (7,), (1, 9)]


def deep(layers: int) -> Any:
    sizes = {"hidden_size": 72, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": layers}
    model = load_model(with_config("llama", **sizes), seed=0).model
    shake(model, frozen=True)
    return model


def calls(world: World, model: Any, scoring: Any) -> list[str]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    target = Target.of([make_batch((8, 10), seed=5)], refresh_steps=2, refresh_samples=2)
    weigh = FilterThenWeight(batch_size=2)
    engine = SelectionEngine(model, optimizer, weigh, target=target, world=world, scoring=scoring)
    for step in range(2):
        engine.backward(make_batch((9, 7, 12, 8, 6), seed=step))
        optimizer.step()
    engine.train(make_batch((9, 7), seed=3))
    return [call[0] for call in getattr(world, "calls", [])]


@pytest.mark.parametrize("scoring", [Sketched, Exact])
def test_a_step_makes_no_more_calls_where_there_are_more_layers(scoring: type, monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(Interaction, monkeypatch)
    counts = []
    for layers in (2, 5):
        models = [deep(layers) for _ in range(2)]

        def work(world: ThreadWorld, models: list[Any] = models) -> Counter[str]:
            return Counter(calls(world, models[world.rank], scoring()))

        counts.append(on_ranks(2, work))
    assert counts[0] == counts[1]
