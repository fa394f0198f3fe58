"""What happens when another library changes the model under a capture: an error that names it, or exact gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.places import MissingFactorError, ReplacedParameterError
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.oracle import dense, make_batch, make_model, relative_error

EXACT = 1e-5  # relative, float32
BATCH = make_batch((8, 6, 7))
WEIGHTS = torch.tensor([0.3, 0.0, 1.7])


def replace_parameter(model: nn.Module, name: str) -> None:
    """Put another object, of other values, where a parameter is."""
    module_name, _, local_name = name.rpartition(".")
    module = model.get_submodule(module_name)
    value = module.get_parameter(local_name).detach()
    setattr(module, local_name, nn.Parameter(1.5 * value))


def assert_exact(capture: GradientCapture, model: nn.Module) -> None:
    oracle = dense(model, BATCH)
    update = capture.run(BATCH).weighted_gradient(WEIGHTS)
    assert update.keys() == oracle.parameters.keys()
    assert relative_error(oracle.flat(update), oracle.update(WEIGHTS)) < EXACT


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "model.layers.0.mlp.down_proj.weight"),
        ("llama", "model.layers.1.input_layernorm.weight"),
        ("llama", "model.embed_tokens.weight"),
        ("llama", "lm_head.weight"),
        ("gpt2", "transformer.h.1.attn.c_attn.bias"),
        ("lora", "model.layers.0.mlp.up_proj.lora_A.default.weight"),
    ],
)
def test_a_replaced_parameter_is_named_until_the_capture_looks_again(kind: str, name: str) -> None:
    model = make_model(kind)
    capture = GradientCapture(model)
    replace_parameter(model, name)
    with pytest.raises(ReplacedParameterError, match=rf"parameter {name} was replaced .*call refresh\(\)"):
        capture.run(BATCH)
    before = list(capture.parameters)
    capture.refresh()
    assert list(capture.parameters) == before
    assert capture.parameters[name] is model.get_parameter(name)
    assert_exact(capture, model)


def test_a_tie_may_move_as_one() -> None:
    model = make_model("qwen2_tied")
    capture = GradientCapture(model)
    replace_parameter(model, "model.embed_tokens.weight")
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ReplacedParameterError, match=r"parameter model\.embed_tokens\.weight was replaced"):
        capture.run(BATCH)
    capture.refresh()
    assert_exact(capture, model)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_tie_that_came_undone_is_refused(name: str) -> None:
    model = make_model("qwen2_tied")
    capture = GradientCapture(model)
    replace_parameter(model, name)
    with pytest.raises(ReplacedParameterError):
        capture.run(BATCH)
    with pytest.raises(ReplacedParameterError, match=r"lm_head\.weight was tied to model\.embed_tokens\.weight"):
        capture.refresh()


def test_a_parameter_that_is_gone_is_refused() -> None:
    """As with libraries that keep weights of their own and leave none where they were."""
    model = make_model("llama")
    capture = GradientCapture(model)
    del model.model.layers[0].mlp.down_proj.weight
    with pytest.raises(ReplacedParameterError, match=r"layers\.0\.mlp\.down_proj\.weight"):
        capture.run(BATCH)
    with pytest.raises(ReplacedParameterError, match=r"layers\.0\.mlp\.down_proj\.weight is gone"):
        capture.refresh()


def behind_its_modules_backs(mlp: Any) -> Callable[[Tensor], Tensor]:
    """A forward that uses the weights and calls none of the modules, as kernels in one piece do."""

    def forward(x: Tensor) -> Tensor:
        gate, up = (F.linear(x, layer.weight) for layer in (mlp.gate_proj, mlp.up_proj))
        return F.linear(F.silu(gate) * up, mlp.down_proj.weight)

    return forward


def detached(mlp: Any) -> Callable[[Tensor], Tensor]:
    """A forward that no gradient comes back through."""
    forward: Callable[[Tensor], Tensor] = mlp.forward
    return lambda x: forward(x).detach()


@pytest.mark.parametrize("change", [behind_its_modules_backs, detached])
@pytest.mark.parametrize("kind", ["llama", "checkpointing"])
def test_a_changed_forward_that_leaves_no_factor_is_named(
    kind: str, change: Callable[[Any], Callable[[Tensor], Tensor]]
) -> None:
    model = make_model(kind)
    capture = GradientCapture(model)
    mlp = model.model.layers[1].mlp
    own, mlp.forward = mlp.forward, change(mlp)
    with pytest.raises(MissingFactorError, match=r"no factor of module model\.layers\.1\.mlp\.down_proj"):
        capture.run(BATCH)
    assert all(parameter.requires_grad for parameter in capture.parameters.values())
    mlp.forward = own
    assert_exact(capture, model)


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("llama", "model.layers.0.input_layernorm"),
        ("llama", "model.layers.0.mlp.down_proj"),
        ("lora", "model.layers.0.mlp.down_proj"),
        ("lora", "model.norm"),
    ],
)
def test_a_forward_of_another_library_is_used_and_stays(kind: str, place: str) -> None:
    """Wrapped as accelerate wraps modules; norms and adapters in one piece would otherwise take its place."""
    model = make_model(kind)
    capture, calls = GradientCapture(model), list[str]()
    module = model.get_submodule(place)
    own = module.forward

    def wrapped(x: Tensor) -> Tensor:
        calls.append(place)
        output: Tensor = own(x)
        return output

    module.forward = wrapped
    capture.run(BATCH)
    assert calls
    assert vars(module)["forward"] is wrapped
    assert_exact(capture, model)


def test_a_forward_that_computes_something_else_is_followed_where_it_can_be() -> None:
    """A norm is a norm however it is scaled: its factor is read off what it computes."""
    model = make_model("llama")
    capture = GradientCapture(model)
    norm = model.model.layers[0].input_layernorm
    own = norm.forward
    norm.forward = lambda x: 2 * own(x)
    assert_exact(capture, model)


def test_a_module_that_no_gradient_reaches_from_the_start_is_no_mistake() -> None:
    """Nothing of the loss depends on it, as on the last layers of a model whose output is taken from further below."""
    model = make_model("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = detached(mlp)
    capture = GradientCapture(model)
    assert_exact(capture, model)
    assert not any(name.startswith("model.layers.1.mlp.") for name in capture.run(BATCH).factors)
