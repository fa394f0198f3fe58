"""The engine on a GPU, where there is one: the decisions of the CPU, and its state from one device to the other."""

from typing import Any

import pytest
import torch
from gradient_selectors.capture.batch import Batch
from gradient_selectors.engine import SelectionEngine
from gradient_selectors.mask.dual_sft import DualSft
from gradient_selectors.mask.masked_adamw import MaskedAdamW
from gradient_selectors.mask.rule import MaskRule
from gradient_selectors.route.gast import Gast
from gradient_selectors.views.rank_one import RankOne
from gradient_selectors.views.scoring import Exact, Scoring
from gradient_selectors.views.sketches import Sketched
from gradient_selectors.weigh.filter_then_weight import FilterThenWeight
from gradient_selectors.weigh.selector import Decision

from tests.helpers.oracle import make_batch, make_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

ROUNDING = 1e-3  # of losses in nats, and of coefficients: sums are taken in another order, and updates build on updates
LENGTHS = (9, 7, 12, 8, 6, 10, 11, 9)
SCORINGS: dict[str, type[Exact] | type[Sketched]] = {"exact": Exact, "rank_one": RankOne, "sketched": Sketched}


class Run:
    """Steps on a device."""

    def __init__(self, device: str, kind: str, scoring: Scoring, masked: bool = False) -> None:
        self.model: Any = make_model(kind).to(device)
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer = MaskedAdamW(trained, lr=1e-3)
        if not masked:
            self.optimizer = torch.optim.AdamW((p for _, p in trained), lr=1e-3)
        self.engine = SelectionEngine(
            self.model,
            self.optimizer,
            FilterThenWeight(3),
            target=[make_batch((8, 9, 7), seed=4)],
            refresh_steps=2,
            scoring=scoring,
            route=Gast(2) if masked else None,
            mask=DualSft(MaskRule(0.3), refresh_steps=2) if masked else None,
        )

    def step(self, number: int) -> Decision:
        batch: Batch = make_batch(LENGTHS, seed=20 + number)
        decision = self.engine.backward(batch)
        self.optimizer.step()
        return decision


def assert_same(found: Run, expected: Run, steps: range) -> None:
    for number in steps:
        one, other = found.step(number), expected.step(number)
        assert one.selected == other.selected
        torch.testing.assert_close(one.coefficients_N.cpu(), other.coefficients_N.cpu(), rtol=0, atol=ROUNDING)
        losses = (run.engine.losses_N.cpu() for run in (found, expected))
        torch.testing.assert_close(*losses, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("kind", ["llama", "qwen2_tied", "gpt2", "lora"])
def test_it_decides_as_the_cpu_does(kind: str, scoring: str) -> None:
    assert_same(Run("cuda", kind, SCORINGS[scoring]()), Run("cpu", kind, SCORINGS[scoring]()), range(5))


def test_a_state_moves_to_the_device_it_is_loaded_on() -> None:
    """Everything on; saved on the CPU, gone on with on the GPU."""
    expected, found = (Run(device, "llama", Sketched(), masked=True) for device in ("cpu", "cuda"))
    for number in range(3):
        expected.step(number)
    found.model.load_state_dict(expected.model.state_dict())
    found.optimizer.load_state_dict(expected.optimizer.state_dict())
    found.engine.load_state_dict(expected.engine.state_dict())
    assert_same(found, expected, range(3, 6))
