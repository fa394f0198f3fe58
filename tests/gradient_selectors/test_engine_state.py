"""What an engine keeps: a run that goes on from its state makes the same steps, bit for bit."""

import copy
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_selectors.engine import SelectionEngine
from gradient_selectors.mask.dual_sft import Anchors, DualSft, Response
from gradient_selectors.mask.masked_adamw import MaskedAdamW
from gradient_selectors.mask.rule import MaskRule
from gradient_selectors.route.gast import Gast
from gradient_selectors.state import flatten, unflatten
from gradient_selectors.target import Target
from gradient_selectors.views.sketches import Sketched
from gradient_selectors.weigh.baselines import TopK
from gradient_selectors.weigh.filter_then_weight import FilterThenWeight
from safetensors.torch import load, save
from torch import Tensor

from stream_trainer.models.loading import load_model
from tests.gradient_selectors.test_engine import LENGTHS, adamw, target_batches
from tests.helpers.oracle import make_batch, make_model
from tests.helpers.tiny_models import shake, with_config

WIDE = {"hidden_size": 80, "intermediate_size": 96, "num_key_value_heads": 2}  # above 64, matrices are not written out


class AllOn:
    """Sketches, routes and masks that are refreshed, guarded by anchors: everything that keeps anything."""

    def __init__(self, seed: int, masked: bool = True) -> None:
        """`seed`: of the generators, which a state is to set right. Under a mask sketches have no direction."""
        self.model = load_model(with_config("llama", **WIDE), seed=0).model
        shake(self.model)
        mask: DualSft | None = None
        self.optimizer: torch.optim.Optimizer = adamw(self.model)
        if masked:
            self.optimizer = MaskedAdamW(self.model.named_parameters(), lr=1e-2)
            response = Response(learning_rate=1e-2, lambda_anchor=0.3)
            anchors = Anchors.of(self.model, [make_batch((6, 8), seed=40)], response)
            mask = DualSft(MaskRule(0.2), response, refresh_steps=3, anchors=anchors)
        self.scoring = Sketched(8, torch.Generator().manual_seed(seed))
        self.engine = SelectionEngine(
            self.model,
            self.optimizer,
            FilterThenWeight(3),
            target=Target.of(target_batches(), refresh_steps=3, refresh_samples=2),
            scoring=self.scoring,
            route=Gast(2, torch.Generator().manual_seed(seed)),
            mask=mask,
            preconditioner_warmup_steps=2,
            reports_utilities=True,
        )

    def step(self, number: int) -> dict[str, Any]:
        """What a step decided and found, bit for bit."""
        decision = self.engine.backward(make_batch(LENGTHS, seed=100 + number))
        self.optimizer.step()
        last = self.engine.last
        assert last is not None
        assert decision.coefficients_LN is not None
        assert last.utilities_N is not None
        return {
            "coefficients": decision.coefficients_N.tolist(),
            "by layer": decision.coefficients_LN.tolist(),
            "losses": last.losses_N.tolist(),
            "utilities": last.utilities_N.tolist(),
            "refreshed": last.target_refreshed,
            "mask": last.mask_change,
        }

    def state(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"engine": self.engine, "optimizer": self.optimizer, "model": self.model}
        return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})

    def load(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.engine.load_state_dict(state["engine"])


def by_way_of_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """Tensors in safetensors, which sorts their names, and all else in JSON."""
    tensors, rest = flatten(state)
    written = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    return unflatten(load(written), json.loads(json.dumps(rest)))


def shuffled(state: dict[str, Any]) -> dict[str, Any]:
    """Every dictionary in another order."""
    names = list(state)
    random.Random(3).shuffle(names)
    return {name: shuffled(state[name]) if isinstance(state[name], dict) else state[name] for name in names}


Whole = tuple[bool, list[dict[str, Any]], dict[int, dict[str, Any]]]


@pytest.fixture(scope="module", params=[True, False], ids=["masked", "free"])
def whole(request: pytest.FixtureRequest) -> Whole:
    """Every step of a run that nothing interrupts, and what could be saved after each."""
    run = AllOn(seed=0, masked=request.param)
    steps, states = [], {}
    for number in range(9):
        steps.append(run.step(number))
        states[number + 1] = run.state()
    assert run.scoring.projections
    assert any(found.direction is not None for found in run.scoring.projections.values()) != request.param
    assert [step["refreshed"] for step in steps] == [True, False, False] * 3
    assert (sum(step["mask"] is not None for step in steps) >= 3) == request.param
    return request.param, steps, states


@pytest.mark.parametrize(
    ("interrupted", "way"),
    [
        *((step, by_way_of_a_file) for step in (1, 2, 5)),
        (2, shuffled),
        *(pytest.param(step, shuffled, marks=pytest.mark.slow) for step in (1, 5)),
    ],
)
def test_a_run_goes_on_from_its_state_bit_for_bit(
    interrupted: int, way: Callable[[dict[str, Any]], dict[str, Any]], whole: Whole
) -> None:
    """Everything on, before and after the optimizer has warmed up, and between refreshes of target and mask."""
    masked, steps, states = whole
    run, saved = AllOn(seed=9, masked=masked), states[interrupted]
    run.load(
        {name: way(part) if masked or name != "optimizer" else copy.deepcopy(part) for name, part in saved.items()}
    )
    for number in range(interrupted, len(steps)):
        assert run.step(number) == steps[number]
    for name, values in states[len(steps)]["model"].items():
        assert torch.equal(run.model.state_dict()[name], values)


def test_a_state_is_taken_over_as_a_copy() -> None:
    """What is saved of a live run may be loaded into another one, and neither disturbs the other."""
    first, second = AllOn(seed=0), AllOn(seed=9)
    for number in range(3):
        first.step(number)
    saved = first.state()
    second.model.load_state_dict(saved["model"])
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.engine.load_state_dict(first.engine.state_dict())
    for number in range(3, 6):
        one, other = first.step(number), second.step(number)
        assert one == other


def test_parts_that_were_off_begin_afresh_and_parts_that_are_off_now_are_passed_over() -> None:
    """A checkpoint of another selection is no mistake."""
    run = AllOn(seed=0)
    run.step(0)
    model = make_model("llama")
    engine = SelectionEngine(model, adamw(model), TopK(2), target=target_batches())
    engine.load_state_dict({"route": run.engine.state_dict()["route"], "scoring": {}})
    assert engine.backward(make_batch(LENGTHS)).selected
    fresh = AllOn(seed=0)
    fresh.engine.load_state_dict({"target": {"gradient": {}, "age": 0, "refreshes": 0}})
    assert fresh.step(0) == AllOn(seed=0).step(0)


def test_the_state_is_tensors_and_json(tmp_path: Path) -> None:
    run = AllOn(seed=0)
    run.step(0)
    state = run.engine.state_dict()
    assert state.keys() == {"target", "scoring", "route", "mask"}
    tensors, rest = flatten(state)
    assert all(isinstance(tensor, Tensor) for tensor in tensors.values())
    (tmp_path / "rest.json").write_text(json.dumps(rest))
    again = unflatten(tensors, json.loads((tmp_path / "rest.json").read_text()))
    assert flatten(again)[0].keys() == tensors.keys()
    assert flatten(again)[1] == rest
