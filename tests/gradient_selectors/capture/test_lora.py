"""LoRA's layers in one piece: exact, only where they compute what they should, and only while a pass runs.

That a pass over adapters agrees with autograd through PEFT's own layers is in `test_capture`, for `lora` and
`lora_checkpointing`; here is which layers take the short way at all, and what it leaves behind.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.lora import LoraLinear, recognise_lora
from gradient_selectors.capture.places import UnsupportedParameterError
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from tests.helpers.oracle import dense, make_batch, make_model, relative_error

IN, OUT, RANK = 6, 10, 3
ROUNDING = 1.5  # times torch's own, of passes in bfloat16


def adapted(base: nn.Module | None = None, **config: Any) -> Any:
    """A layer with PEFT's adapters, whose weights are all random."""
    torch.manual_seed(0)
    holder = nn.ModuleDict({"layer": base or nn.Linear(IN, OUT)})
    options = {"r": RANK, "lora_alpha": 5, "lora_dropout": 0.0, "target_modules": ["layer"]}
    layer = inject_adapter_in_model(LoraConfig(**options | config), holder)["layer"]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def two_adapters() -> Any:
    layer = adapted()
    layer.update_layer("second", RANK, lora_alpha=2, config=LoraConfig(r=RANK, lora_dropout=0.0))
    layer.set_adapter(["default", "second"])
    return layer


def merged() -> Any:
    layer = adapted()
    layer.merge()
    return layer


def disabled() -> Any:
    layer = adapted()
    layer.enable_adapters(False)
    return layer


def packed() -> Any:
    layer = adapted()
    layer.base_layer.weight = nn.Parameter(torch.zeros(IN * OUT // 2, 1, dtype=torch.uint8), requires_grad=False)
    return layer


def patched() -> Any:
    layer = adapted()
    layer.forward = layer.base_layer.forward
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank_stabilised", [True, False])
def test_an_adapted_layer_is_recognised_and_computes_the_same(bias: bool, rank_stabilised: bool) -> None:
    module = adapted(nn.Linear(IN, OUT, bias=bias), use_rslora=rank_stabilised)
    layer = recognise_lora("mlp", module)
    assert layer is not None
    assert (layer.down, layer.up) == ("mlp.lora_A.default", "mlp.lora_B.default")
    x = torch.randn(2, 4, IN, requires_grad=True)
    anchor, calls = torch.zeros((), requires_grad=True), {}
    output = layer.forward(x, anchor, None, lambda name, inputs, grad: calls.update({name: (inputs, grad)}))
    seed = torch.randn(2, 4, OUT)
    (got,) = torch.autograd.grad(output, x, seed)
    down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
    expected = module(x)
    torch.testing.assert_close(output, expected)
    want, *of_weights = torch.autograd.grad(expected, [x, down, up], seed)
    torch.testing.assert_close(got, want)
    for name, gradient in zip((layer.down, layer.up), of_weights, strict=True):
        inputs, grad = calls[name]
        torch.testing.assert_close(torch.einsum("ntp,ntd->pd", grad, inputs), gradient)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("all_of_it", [True, False], ids=["adapters too", "base alone"])
def test_a_layer_in_bfloat16_is_recognised_and_computes_the_same_up_to_rounding(bias: bool, all_of_it: bool) -> None:
    module = adapted(nn.Linear(IN, OUT, bias=bias))
    (module if all_of_it else module.base_layer).bfloat16()
    layer = recognise_lora("mlp", module)
    assert layer is not None
    x = torch.randn(2, 4, IN).bfloat16()
    output = layer.forward(x, torch.zeros((), requires_grad=True), None, lambda *_: None)
    want = module.double()(x.double()).detach()
    assert output.dtype is torch.bfloat16
    assert relative_error(output.detach(), want) < 0.02


@pytest.mark.parametrize(
    "make",
    [
        lambda: adapted(use_dora=True),
        lambda: adapted(lora_bias=True),
        lambda: adapted(lora_dropout=0.5),
        lambda: adapted(lora_dropout=0.5).eval(),
        lambda: adapted(nn.Embedding(OUT, IN)),
        lambda: nn.Linear(IN, OUT),
        two_adapters,
        merged,
        disabled,
        packed,
        patched,
    ],
    ids=[
        "dora",
        "bias",
        "dropout",
        "eval",
        "embedding",
        "none",
        "two",
        "merged",
        "disabled",
        "packed",
        "patched",
    ],
)
def test_what_computes_anything_else_keeps_its_forward(make: Callable[[], Any]) -> None:
    assert recognise_lora("layer", make()) is None


@pytest.mark.parametrize("kind", ["lora", "lora_checkpointing"])
def test_a_pass_does_without_the_layers_own_forward(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model(kind), make_batch((8, 5, 7))
    capture, oracle = GradientCapture(model), dense(model, batch)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("PEFT's forward ran")

    monkeypatch.setattr(PeftLinear, "forward", fail)
    gradients = capture.run(batch)
    weights = torch.tensor([0.3, 0.0, 1.7])
    assert relative_error(oracle.flat(gradients.weighted_gradient(weights)), oracle.update(weights)) < 1e-5


def test_afterwards_the_layers_are_as_they_were() -> None:
    model, batch = make_model("lora"), make_batch((8, 5, 7))
    before = model(input_ids=batch.input_ids_NT).logits
    capture = GradientCapture(model)
    capture.run(batch)
    unknown = torch.full_like(batch.input_ids_NT, 10**6)
    with pytest.raises(IndexError):
        capture.run(replace(batch, input_ids_NT=unknown))
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(input_ids=batch.input_ids_NT).logits, before)


def test_adapters_of_a_layer_whose_base_is_trained_too_are_captured_by_their_taps() -> None:
    model, batch = make_model("lora"), make_batch((8, 5, 7))
    base = model.model.layers[0].mlp.down_proj.base_layer
    base.weight.requires_grad_(True)
    capture, oracle = GradientCapture(model), dense(model, batch)
    weights = torch.tensor([0.3, 0.5, 1.7])
    update = capture.run(batch).weighted_gradient(weights)
    assert "model.layers.0.mlp.down_proj.base_layer.weight" in update
    assert relative_error(oracle.flat(update), oracle.update(weights)) < 1e-5


def test_layers_that_were_merged_meanwhile_are_left_to_peft() -> None:
    model, batch = make_model("lora"), make_batch((8, 5, 7))
    capture = GradientCapture(model)
    before = capture.run(batch).losses_N
    layer = model.model.layers[0].mlp.down_proj
    layer.merge()
    torch.testing.assert_close(capture.run(batch).losses_N, before)
    layer.unmerge()
    layer.enable_adapters(False)
    without = dense(model, batch).losses
    torch.testing.assert_close(capture.run(batch).losses_N, without.float())


def in_bfloat16(model: Any) -> Any:
    """Its frozen weights, that is."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    return model


def test_a_wrong_factor_on_a_base_in_bfloat16_does_not_pass_for_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    GradientCapture(in_bfloat16(make_model("lora")), torch.bfloat16)
    monkeypatch.setattr(LoraLinear, "scaling", property(lambda self: 1.5 * self.module.scaling[self.adapter]))
    with pytest.raises(UnsupportedParameterError, match="differs from autograd's"):
        GradientCapture(in_bfloat16(make_model("lora")), torch.bfloat16)


def test_bfloat16_agrees_with_autograd_up_to_rounding() -> None:
    model, batch = make_model("lora"), make_batch((16,) * 8)
    capture = GradientCapture(model, autocast=torch.bfloat16)
    oracle, weights = dense(model, batch), torch.rand(8, generator=torch.Generator().manual_seed(0))
    update = capture.run(batch).weighted_gradient(weights)
    want, of_torch = oracle.update(weights), dense(model, batch, torch.bfloat16).update(weights)
    assert relative_error(oracle.flat(update), want) < ROUNDING * relative_error(of_torch, want)
