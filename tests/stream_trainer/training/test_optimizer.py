"""The optimizer and its learning rate, the mask it may start from, and its state by parameter name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_selectors import MaskedAdamW
from safetensors.torch import save_file

from stream_trainer.errors import SettingsError
from stream_trainer.models.loading import load_model
from stream_trainer.settings.schema import OptimizerSettings
from stream_trainer.settings.sections.selection import SelectionSettings
from stream_trainer.training.optimizer import NamedAdamW, learning_rate, make_optimizer, start_from
from tests.helpers.tiny_models import settings_of


@pytest.mark.parametrize(
    ("schedule", "updates", "share"),
    [
        ("constant", 0, 0.25),
        ("constant", 3, 1.0),
        ("constant", 1000, 1.0),
        ("linear", 4, 1.0),
        ("linear", 9, 0.55),
        ("linear", 50, 0.1),
        ("cosine", 9, 0.55),
        ("cosine", 50, 0.1),
    ],
)
def test_schedules(schedule: str, updates: int, share: float) -> None:
    given = {"learning_rate": 2.0, "schedule": schedule, "warmup_steps": 4, "decay_steps": 10}
    assert learning_rate(OptimizerSettings.model_validate(given), updates) == pytest.approx(2.0 * share)


def model_of_two_layers() -> torch.nn.Module:
    return load_model(settings_of("llama"), seed=5).model


@pytest.mark.parametrize(
    ("selection", "kind"), [({}, NamedAdamW), ({"mask": "dual_sft"}, MaskedAdamW)], ids=["all move", "masked"]
)
def test_biases_and_norms_are_not_decayed(selection: dict[str, Any], kind: type) -> None:
    model = model_of_two_layers()
    optimizer = make_optimizer(model, OptimizerSettings(weight_decay=0.1), SelectionSettings(**selection))
    assert type(optimizer) is kind
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {decays[p] for p in model.parameters() if p.ndim > 1} == {0.1}
    assert {decays[p] for p in model.parameters() if p.ndim <= 1} == {0.0}
    assert optimizer.parameters.keys() == dict(model.named_parameters()).keys()


def test_state_goes_by_parameter_name_and_is_a_copy() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = NamedAdamW([{"params": [("a.weight", weight)]}], lr=0.1)
    assert optimizer.state_dict() == {}
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state_dict()
    assert state.keys() == {"a.weight.step", "a.weight.exp_avg", "a.weight.exp_avg_sq"}
    other = torch.nn.Parameter(torch.ones(2, 3))
    again = NamedAdamW([{"params": [("a.weight", other)]}], lr=0.5)
    again.load_state_dict(state)
    state["a.weight.exp_avg"].zero_()
    assert torch.equal(again.state[other]["exp_avg"], torch.full((2, 3), 0.1))
    assert again.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("key", "tensor", "says"),
    [
        ("b.weight.exp_avg", torch.ones(2, 3), "of b.weight, which is not trained"),
        ("a.weight.exp_avg", torch.ones(3), r"exp_avg of a.weight is \(3,\), not \(2, 3\)"),
        ("a.weight.kept", torch.zeros(0), "made with a mask; set selection.mask to fixed or dual_sft"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(key: str, tensor: torch.Tensor, says: str) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = NamedAdamW([{"params": [("a.weight", weight)]}], lr=0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with pytest.raises(ValueError, match=says):
        optimizer.load_state_dict({key: tensor})
    assert float(optimizer.state[weight]["step"]) == 1


def test_a_mask_that_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    missing, other, empty = (tmp_path / f"{name}.safetensors" for name in ("missing", "other", "empty"))
    save_file({"lm_head.weight": torch.ones(2, 2, dtype=torch.bool)}, other)
    model = model_of_two_layers()
    save_file({name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}, empty)
    for path, reason in ((missing, "cannot be read"), (other, "does not fit"), (empty, "no weight at all")):
        with pytest.raises(SettingsError, match=f"selection.mask_path=.*{reason}.*; name the mask") as caught:
            start_from(MaskedAdamW(model.named_parameters()), path)
        assert "\n" not in str(caught.value)
