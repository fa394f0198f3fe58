"""One canonical order of parameters: a target's gradient that comes back from a file decides as the live one does.

A pass leaves names in its own order, safetensors sorts them. On matrices above 64 on a side, sums and random draws that
followed the order of a dictionary once chose other samples.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from gradient_selectors.draw.cluster_ucb import ClusterUcb, StreamOptions
from gradient_selectors.engine import SelectionEngine
from gradient_selectors.mask.dual_sft import DualSft
from gradient_selectors.mask.masked_adamw import MaskedAdamW
from gradient_selectors.mask.rule import MaskRule
from gradient_selectors.route.gast import Gast
from gradient_selectors.views.rank_one import RankOne
from gradient_selectors.views.scoring import Exact, Scoring
from gradient_selectors.views.sketches import Sketched
from gradient_selectors.weigh.filter_then_weight import FilterThenWeight
from torch import Tensor

from stream_trainer.models.loading import load_model
from stream_trainer.settings.schema import LoraSettings, ModelSettings
from tests.helpers.oracle import make_batch
from tests.helpers.tiny_models import CONFIGS, shake

LENGTHS = (9, 7, 12, 8, 6, 10)
LLAMA = {"hidden_size": 80, "intermediate_size": 96, "num_key_value_heads": 2}
KINDS = {
    "llama": ("llama", LLAMA, None),
    "qwen2_tied": ("qwen2", LLAMA, None),
    "gpt2": ("gpt2", {"n_embd": 80}, None),
    "lora": ("llama", LLAMA, LoraSettings(rank=72, alpha=72.0)),
}
SCORINGS: dict[str, Callable[[], Scoring]] = {
    "exact": Exact,
    "rank_one": RankOne,
    "sketched": lambda: Sketched(8, torch.Generator().manual_seed(0)),
}


def by_name(names: list[str]) -> list[str]:
    return sorted(names)


def backwards(names: list[str]) -> list[str]:
    return names[::-1]


def shuffled(names: list[str]) -> list[str]:
    return random.Random(5).sample(names, len(names))


def decisions(kind: str, scoring: str, masked: bool, order: Callable[[list[str]], list[str]]) -> dict[str, Any]:
    """What steps decide and leave, from a second step on whose target's gradient has its names in some order."""
    family, changes, lora = KINDS[kind]
    settings = ModelSettings(config={**CONFIGS[family], **changes}, tokenizer="bytes", lora=lora)
    model = load_model(settings, seed=0).model
    shake(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW([p for _, p in trained], lr=1e-2)
    if masked:
        optimizer = MaskedAdamW(trained, lr=1e-2)
    bandit = ClusterUcb(StreamOptions(num_clusters=3), seed=0, target_d=torch.ones(6))
    engine = SelectionEngine(
        model,
        optimizer,
        FilterThenWeight(3),
        target=[make_batch((6, 9, 7), seed=4)],
        refresh_steps=2,
        scoring=SCORINGS[scoring](),
        route=Gast(2, torch.Generator().manual_seed(0)),
        mask=DualSft(MaskRule(0.2), refresh_steps=2) if masked else None,
        reports_utilities=True,
    )
    found: dict[str, Any] = {}
    for step in range(4):
        if engine.target is not None and engine.target.gradient is not None:
            gradient: Mapping[str, Tensor] = engine.target.gradient
            engine.target.gradient = {name: gradient[name] for name in order(list(gradient))}
            engine.scoring.reset()  # else what was projected before the names had another order would serve again
        features_Nd = torch.randn(6, 6, generator=torch.Generator().manual_seed(step))
        arms_n = bandit.draw(features_Nd, 6).arms_n
        decision = engine.backward(make_batch(LENGTHS, seed=100 + step))
        optimizer.step()
        assert engine.last is not None
        assert engine.last.utilities_N is not None
        assert decision.coefficients_LN is not None
        bandit.observe(arms_n, engine.last.utilities_N)
        found[f"coefficients {step}"] = decision.coefficients_LN
        found[f"utilities {step}"] = engine.last.utilities_N
    found |= {f"bandit {name}": value for name, value in bandit.state_dict().items()}
    return found | {name: parameter.detach() for name, parameter in trained}


@pytest.fixture(scope="module")
def live() -> dict[tuple[str, str, bool], dict[str, Any]]:
    """What was decided with the names in the order in which a pass leaves them, kept between tests."""
    return {}


@pytest.mark.parametrize(
    "order", [*(pytest.param(order, marks=pytest.mark.slow) for order in (by_name, backwards)), shuffled]
)
@pytest.mark.parametrize(
    ("kind", "scoring", "masked"),
    [(kind, scoring, False) for kind in KINDS for scoring in SCORINGS] + [("llama", s, True) for s in SCORINGS],
)
def test_the_order_of_the_targets_names_decides_nothing(
    kind: str,
    scoring: str,
    masked: bool,
    order: Callable[[list[str]], list[str]],
    live: dict[tuple[str, str, bool], dict[str, Any]],
) -> None:
    """Coefficients of every layer, utilities and what a bandit learns of them, mask and weights: equal bits."""
    key = kind, scoring, masked
    if key not in live:
        live[key] = decisions(*key, list)
    found = decisions(*key, order)
    for name, values in live[key].items():
        assert torch.equal(found[name], values), name
