"""AdamW in 8 bits: near torch's own, with the preconditioner of what it holds, in a quarter of the memory."""

import sys
from typing import Any

import pytest
import torch
from gradient_selectors.preconditioner import adam_preconditioner, anticipated, optimizer_steps, preconditioner_of
from torch import nn

from stream_trainer.errors import SettingsError
from stream_trainer.models.loading import load_model
from stream_trainer.settings.schema import OptimizerSettings, Settings
from stream_trainer.settings.sections.selection import SelectionSettings
from stream_trainer.training.optimizer import NamedAdamW, make_optimizer
from tests.helpers.tiny_models import settings_of

INT8 = OptimizerSettings(moments="int8", weight_decay=0.1, learning_rate=1e-2)
LARGE, SMALL = (80, 64), (64,)  # weights: more than 4,096, and fewer


def model_of() -> nn.Module:
    """A matrix in 8 bits and a vector that is too small for them."""
    torch.manual_seed(0)
    model = nn.Module()
    model.matrix, model.vector = nn.Parameter(torch.randn(LARGE)), nn.Parameter(torch.randn(SMALL))
    return model


def train(model: nn.Module, optimizer: Any, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def made(settings: OptimizerSettings) -> tuple[nn.Module, Any]:
    pytest.importorskip("bitsandbytes")
    model = model_of()
    return model, make_optimizer(model, settings, SelectionSettings())


def test_it_moves_weights_as_torchs_adamw_does_up_to_its_rounding() -> None:
    (model, optimizer), exact = made(INT8), model_of()
    before = model_of()
    train(model, optimizer, 20)
    train(exact, make_optimizer(exact, INT8.model_copy(update={"moments": "float32"}), SelectionSettings()), 20)
    for name, want in exact.named_parameters():
        way = (want - before.get_parameter(name)).norm()
        assert (model.get_parameter(name) - want).norm() < (0.1 if name == "matrix" else 1e-2) * way
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}


def test_moments_of_a_large_parameter_take_a_quarter() -> None:
    model, optimizer = made(INT8)
    train(model, optimizer, 1)
    held = {key: value for key, value in optimizer.state_dict().items() if key.startswith("matrix.")}
    assert sum(value.nbytes for value in held.values()) < 2.1 * model.get_parameter("matrix").numel()
    assert optimizer.state_dict()["vector.state1"].dtype is torch.float32


def test_preconditioner_is_adams_of_the_moment_that_is_held() -> None:
    model, optimizer = made(INT8)
    parameters = dict(model.named_parameters())
    assert preconditioner_of(optimizer, parameters)("matrix") is None
    exact = model_of()
    torch_adamw = make_optimizer(exact, OptimizerSettings(weight_decay=0.1, learning_rate=1e-2), SelectionSettings())
    train(model, optimizer, 6)
    train(exact, torch_adamw, 6)
    assert optimizer_steps(optimizer) == 6
    assert preconditioner_of(optimizer, parameters, warmup_steps=7)("matrix") is None
    ours = preconditioner_of(optimizer, parameters)
    theirs = preconditioner_of(torch_adamw, dict(exact.named_parameters()))
    for name, tolerance in (("matrix", 0.05), ("vector", 1e-5)):
        got, want = ours(name), theirs(name)
        assert got is not None
        assert want is not None
        assert (got - want).norm() < tolerance * want.norm()
    state = optimizer.state[model.get_parameter("vector")]
    second = anticipated(state["state2"], 6, 0.999)
    torch.testing.assert_close(ours("vector"), adam_preconditioner(second, 6, 1.0, (0.9, 0.999), 1e-8))


def test_training_goes_on_bit_for_bit_from_a_saved_state() -> None:
    model, optimizer = made(INT8)
    train(model, optimizer, 3)
    state = {key: value.clone() for key, value in optimizer.state_dict().items()}
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    train(model, optimizer, 3, seed=2)
    again, its_optimizer = made(INT8)
    again.load_state_dict(weights)
    its_optimizer.load_state_dict(state)
    train(again, its_optimizer, 3, seed=2)
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    for key, value in optimizer.state_dict().items():
        assert torch.equal(its_optimizer.state_dict()[key], value), key


def test_a_state_of_the_other_precision_is_refused() -> None:
    model, optimizer = made(INT8)
    exact = NamedAdamW([{"params": list(model.named_parameters())}])
    train(model, optimizer, 1)
    train(model, exact, 1)
    with pytest.raises(ValueError, match=r"made with moments in float32; set optimizer.moments to float32"):
        optimizer.load_state_dict(exact.state_dict())
    with pytest.raises(ValueError, match=r"made with moments in 8 bits; set optimizer.moments to int8"):
        exact.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="of other, which is not trained"):
        optimizer.load_state_dict({"other.state1": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"state1 of vector is \(1,\), not \(64,\)"):
        optimizer.load_state_dict({"vector.state1": torch.zeros(1)})
    assert optimizer_steps(optimizer) == 1


def test_missing_bitsandbytes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bitsandbytes", "bitsandbytes.functional", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "stream_trainer.training.moments", raising=False)
    with pytest.raises(SettingsError, match=r"^optimizer.moments=int8 needs .*'stream-trainer\[quantised\]'$"):
        make_optimizer(load_model(settings_of("llama"), seed=1).model, INT8, SelectionSettings())


def test_moments_of_some_weights_only_are_not_held_in_8_bits() -> None:
    sections = {"model": settings_of("llama"), "target": {"path": "t"}, "optimizer": {"moments": "int8"}}
    source = {"kind": "jsonl", "jsonl": {"path": "s"}}
    with pytest.raises(ValueError, match=r"int8 does not go with selection.mask=dual_sft.*to float32"):
        Settings.model_validate({"source": source, "selection": {"mask": "dual_sft"}, **sections})
