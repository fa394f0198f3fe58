"""RMS norms in one piece: recognised by what they compute, and equal to autograd."""

from collections.abc import Callable

import pytest
import torch
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.norms import recognise_rms_norm
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from tests.helpers.oracle import dense, make_batch, make_model, relative_error

WIDTH = 24
ROUNDING = 1.5  # times torch's own, of passes in bfloat16


class Doubled(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Absolute(nn.Module):
    """Divides by the mean size and not by the root of the mean square."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / x.abs().mean(-1, keepdim=True)


def patched() -> nn.Module:
    norm: nn.Module = LlamaRMSNorm(WIDTH)
    vars(norm)["forward"] = lambda hidden_states: hidden_states
    return norm


@pytest.mark.parametrize(
    ("make", "offset", "epsilon"),
    [
        (lambda: LlamaRMSNorm(WIDTH, 1e-6), 0.0, 1e-6),
        (lambda: T5LayerNorm(WIDTH, 1e-5), 0.0, 1e-5),
        (lambda: GemmaRMSNorm(WIDTH, 1e-6), 1.0, 1e-6),
        (lambda: nn.RMSNorm(WIDTH, 1e-3), 0.0, 1e-3),
        (lambda: nn.RMSNorm(WIDTH), 0.0, torch.finfo(torch.float32).eps),
    ],
    ids=["llama", "t5", "gemma", "torch", "torch's epsilon"],
)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_output_and_both_gradients_are_autograds(
    make: Callable[[], nn.Module], offset: float, epsilon: float, size: float
) -> None:
    module, generator = make(), torch.Generator().manual_seed(1)
    weight = module.get_parameter("weight")
    with torch.no_grad():
        weight.add_(torch.randn(WIDTH, generator=generator))
    norm = recognise_rms_norm("norm", module)
    assert norm is not None
    assert norm.offset == offset
    assert norm.epsilon == pytest.approx(epsilon, rel=1e-3)
    x = (size * torch.randn(3, 5, WIDTH, generator=generator)).requires_grad_(True)
    seed = torch.randn(3, 5, WIDTH, generator=generator)
    want = module(x)
    wanted = torch.autograd.grad(want, (x, weight), seed)
    products: list[Tensor] = []
    weight.requires_grad_(False)
    got = norm.forward(x, torch.zeros((), requires_grad=True), lambda _, found: products.append(found))
    (gradient,) = torch.autograd.grad(got, x, seed)
    torch.testing.assert_close(got, want)
    assert relative_error(gradient, wanted[0]) < 1e-5
    assert relative_error(products[0].sum((0, 1)), wanted[1]) < 1e-5


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LayerNorm(WIDTH),
        lambda: nn.LayerNorm(WIDTH, bias=False),
        lambda: nn.RMSNorm((2, WIDTH)),
        lambda: LlamaRMSNorm(WIDTH).bfloat16(),
        lambda: Doubled(WIDTH),
        Absolute,
        lambda: nn.Linear(WIDTH, WIDTH, bias=False),
        patched,
    ],
    ids=["layer norm", "without bias", "two dimensions", "bfloat16", "doubled", "mean size", "linear", "patched"],
)
def test_what_computes_anything_else_is_none(make: Callable[[], nn.Module]) -> None:
    assert recognise_rms_norm("norm", make()) is None


@pytest.mark.parametrize("kind", ["llama", "lora"])
def test_a_pass_does_without_the_norms_own_forward(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a model with LoRA are frozen; they are in one piece too, and leave no factor."""
    model, batch = make_model(kind), make_batch((8, 5, 7))
    capture, oracle = GradientCapture(model), dense(model, batch)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the norm's own forward ran")

    with monkeypatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", fail)
        gradients = capture.run(batch)
    weights = torch.tensor([0.3, 0.0, 1.7])
    assert relative_error(oracle.flat(gradients.weighted_gradient(weights)), oracle.update(weights)) < 1e-5
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_norm_of_bfloat16_inputs_keeps_its_own_forward() -> None:
    """Norms of queries and keys see what autocast made of a linear layer."""
    model, batch = make_model("qwen3_head_norms"), make_batch((16,) * 4)
    capture, oracle = GradientCapture(model, autocast=torch.bfloat16), dense(model, batch)
    ran: list[torch.dtype] = []
    norm = model.model.layers[0].self_attn.q_norm
    norm.register_forward_pre_hook(lambda _, args: ran.append(args[0].dtype))
    weights = torch.tensor([0.3, 0.5, 1.7, 1.0])
    update = capture.run(batch).weighted_gradient(weights)
    assert ran[0] == torch.bfloat16
    want, of_torch = oracle.update(weights), dense(model, batch, torch.bfloat16).update(weights)
    assert relative_error(oracle.flat(update), want) < ROUNDING * relative_error(of_torch, want)
