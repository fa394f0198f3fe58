"""Every view of the captured gradients against autograd, one sample at a time, on several families of models."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gradient_selectors.capture import head
from gradient_selectors.capture.batch import Batch
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.factors import Outer, Written
from gradient_selectors.capture.places import UnsupportedParameterError
from gradient_selectors.preconditioner import plain
from gradient_selectors.views.interaction import Interaction
from torch import nn

from stream_trainer.models.loading import load_model
from tests.helpers.oracle import MODELS, dense, make_batch, make_model, random_like, relative_error
from tests.helpers.tiny_models import shake

LENGTHS = (12, 7, 9, 12, 5)
EXACT = 1e-5  # relative, float32
ROUNDING = 1.5  # times torch's own, of passes in bfloat16


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


@pytest.fixture
def capture(model: Any) -> Iterator[GradientCapture]:
    made = GradientCapture(model)
    yield made
    made.close()


@pytest.mark.parametrize("kept", [0, 10**6])
@pytest.mark.parametrize("chunk", [64, 10**6])
def test_rows_gram_and_update_agree_with_autograd(
    chunk: int, kept: int, model: Any, capture: GradientCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the head in many chunks, of positions and of the vocabulary, and in one; its errors kept or made anew."""
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(head, "UPDATE_ELEMENTS", chunk)
    monkeypatch.setattr(head, "KEPT_ELEMENTS", kept)
    batch = make_batch(LENGTHS)
    oracle, gradients = dense(model, batch), capture.run(batch)
    preconditioner, target = random_like(capture, 5), random_like(capture, 6)
    interaction = Interaction(gradients, target, preconditioner.__getitem__)
    assert relative_error(gradients.losses_N, oracle.losses) < EXACT
    direction = oracle.flat(preconditioner) * oracle.flat(target)
    assert relative_error(interaction.utilities_N, oracle.gradients @ direction) < EXACT
    want = oracle.gram(preconditioner)
    assert relative_error(interaction.gram(range(len(LENGTHS))), want) < EXACT
    assert relative_error(interaction.gram([3, 1]), want[[3, 1]][:, [3, 1]]) < EXACT
    weights = torch.tensor([0.1, 0.0, 0.5, 0.7, 1.3])
    update = oracle.flat(gradients.weighted_gradient(weights))
    assert relative_error(update, oracle.update(weights)) < EXACT


@pytest.mark.parametrize("lengths", [(10,), (10, 6, 8, 4)])
@pytest.mark.parametrize("kind", ["llama", "qwen2_tied", "gpt2", "lora"])
def test_target_rows_are_averaged_as_gradients(kind: str, lengths: tuple[int, ...]) -> None:
    """One and several target rows: factors must not be summed over rows before the product."""
    model = make_model(kind)
    capture = GradientCapture(model)
    target_batch, pool = make_batch(lengths, seed=7), make_batch(LENGTHS, seed=8)
    mean = torch.full((len(lengths),), 1 / len(lengths))
    target = capture.run(target_batch).weighted_gradient(mean)
    rows = Interaction(capture.run(pool), target, plain).utilities_N
    of_pool, of_target = dense(model, pool).gradients, dense(model, target_batch).gradients.mean(0)
    # Products cancel, and by how much depends on the processor's kernels: measured in what they could be at most.
    error = (rows.double() - of_pool @ of_target).norm() / (of_pool.norm(dim=1) * of_target.norm()).norm()
    assert float(error) < EXACT


def test_padding_changes_nothing(capture: GradientCapture) -> None:
    batch = make_batch((9, 6))
    padded = Batch(
        torch.nn.functional.pad(batch.input_ids_NT, (0, 5), value=11),
        torch.nn.functional.pad(batch.labels_NT, (0, 5), value=-100),
        batch.lengths,
    )
    weights = torch.tensor([0.4, 0.6])
    once, again = capture.run(batch), capture.run(padded)
    first, second = (torch.cat([g.weighted_gradient_of(n, weights).flatten() for n in g.shapes]) for g in (once, again))
    assert relative_error(second, first) < EXACT


def test_a_sample_of_weight_zero_leaves_no_trace(capture: GradientCapture) -> None:
    batch, other = make_batch((9, 6, 8)), make_batch((9, 6, 8))
    other.input_ids_NT[1, :6] = 42
    weights = torch.tensor([0.5, 0.0, 0.5])
    once, again = capture.run(batch), capture.run(other)
    for name in capture.parameters:
        assert torch.equal(once.weighted_gradient_of(name, weights), again.weighted_gradient_of(name, weights))


def test_a_pass_leaves_weights_and_gradients_alone(capture: GradientCapture) -> None:
    before = {name: p.detach().clone() for name, p in capture.parameters.items()}
    capture.run(make_batch((6, 6)))
    for name, parameter in capture.parameters.items():
        assert parameter.grad is None
        assert parameter.requires_grad
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_weights_that_were_at_their_initial_values_may_move(kind: str) -> None:
    """What is recognised when biases are zero and scales are one must hold when they no longer are."""
    model = load_model(MODELS[kind](), seed=0).model
    capture, batch = GradientCapture(model), make_batch((9, 6, 8))
    shake(model)
    oracle, weights = dense(model, batch), torch.tensor([0.4, 0.0, 1.6])
    update = oracle.flat(capture.run(batch).weighted_gradient(weights))
    assert relative_error(update, oracle.update(weights)) < EXACT


def test_shapes_may_change_from_pass_to_pass() -> None:
    model = make_model("llama")
    capture = GradientCapture(model)
    for lengths in [(4,), (20, 4, 17), (8, 8)]:
        batch = make_batch(lengths)
        rows = torch.stack([capture.run(batch).gram([i], plain)[0, 0] for i in range(len(lengths))])
        assert relative_error(rows, dense(model, batch).gradients.square().sum(1)) < EXACT


def test_bfloat16_keeps_the_order_of_the_scores() -> None:
    model = make_model("llama")
    batch, capture = make_batch((16,) * 8), GradientCapture(model, autocast=torch.bfloat16)
    target = random_like(capture, 3)
    got = Interaction(capture.run(batch), target, plain).utilities_N
    oracle = dense(model, batch)
    want = oracle.gradients @ oracle.flat(target)
    assert float(torch.corrcoef(torch.stack([got.double(), want]))[0, 1]) > 0.999


@pytest.mark.parametrize("kept", [0, 10**6])
@pytest.mark.parametrize("chunk", [64, 10**6])
@pytest.mark.parametrize("kind", ["llama", "qwen2_tied", "gpt2"])
def test_the_update_in_bfloat16_is_that_of_autograd_but_for_rounding(
    kind: str, chunk: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(head, "UPDATE_ELEMENTS", chunk)
    monkeypatch.setattr(head, "KEPT_ELEMENTS", kept)
    model = make_model(kind)
    batch, capture = make_batch(LENGTHS), GradientCapture(model, autocast=torch.bfloat16)
    weights = torch.tensor([0.1, 0.0, 0.5, 0.7, 1.3])
    gradients, oracle = capture.run(batch), dense(model, batch)
    want, of_torch = oracle.update(weights), dense(model, batch, torch.bfloat16).update(weights)
    update = oracle.flat(gradients.weighted_gradient(weights))
    assert relative_error(update, want) < ROUNDING * relative_error(of_torch, want)
    assert capture.head is not None  # else there are no chunks


def test_losses_are_those_of_the_pass(capture: GradientCapture) -> None:
    batch = make_batch(LENGTHS)
    torch.testing.assert_close(capture.losses(batch), capture.run(batch).losses_N)


def test_a_sample_without_labels_is_refused() -> None:
    capture = GradientCapture(make_model("llama"))
    with pytest.raises(ValueError, match="at least one label"):
        capture.run(make_batch((6, 3), prompt=3))


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        GradientCapture(make_model("llama").requires_grad_(False))


class Doubled(nn.Linear):
    """A Linear that is more than one: its class name and its shape say nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * 2)


class Gate(nn.Module):
    """Owns a parameter of no known kind."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate.sigmoid()


class Around(nn.Module):
    """Holds a layer and does something else with it."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner


class RenamedNorm(nn.Module):
    """An RMSNorm by behaviour only, with a weight around zero as in Gemma."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


@pytest.mark.parametrize("intruder", [Doubled(16, 16, bias=False), Gate()])
def test_an_unsupported_parameter_is_named(intruder: nn.Module) -> None:
    model = make_model("llama")
    model.model.layers[1].self_attn.o_proj = intruder
    with pytest.raises(UnsupportedParameterError, match=r"model\.layers\.1\.self_attn\.o_proj\.(weight|gate)"):
        GradientCapture(model)


def test_an_unsupported_parameter_may_stay_frozen() -> None:
    model = make_model("llama")
    model.model.layers[1].self_attn.o_proj = Gate().requires_grad_(False)
    batch = make_batch((8, 6))
    weights = torch.ones(2)
    update = GradientCapture(model).run(batch).weighted_gradient(weights)
    oracle = dense(model, batch)
    assert relative_error(oracle.flat(update), oracle.gradients.sum(0)) < EXACT


def test_a_parameter_used_behind_its_modules_back_is_named() -> None:
    """Its hooks never fire, so only the comparison with autograd can tell."""

    class Bypass(Around):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.inner.weight)

    model = make_model("llama")
    attention = model.model.layers[0].self_attn
    attention.o_proj = Bypass(attention.o_proj)
    with pytest.raises(UnsupportedParameterError, match=r"layers\.0\.self_attn\.o_proj\.inner\.weight"):
        GradientCapture(model)


def test_a_parameter_that_a_zero_hides_is_named() -> None:
    """As fresh adapters are: the gradient of what is used wrongly is zero until the other one has moved."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(16, 3, bias=False), nn.Linear(3, 16, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = x + self.up(torch.nn.functional.linear(x, self.down.weight))
            return output

    model = make_model("llama")
    model.model.layers[0].self_attn.o_proj = Adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UnsupportedParameterError, match=r"layers\.0\.self_attn\.o_proj\.down\.weight"):
        GradientCapture(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class InPlace(Around):
    """Writes over what a layer gave it, as Falcon's blocks do."""

    def __init__(self, inner: nn.Linear, write: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(inner)
        self.write = write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.write(self.inner(x))


@pytest.mark.parametrize("kind", ["llama", "lora", "checkpointing"])
@pytest.mark.parametrize(
    "write", [lambda y: y.add_(0.5), lambda y: y.mul_(1.5), lambda y: y.relu_()], ids=["add", "mul", "relu"]
)
def test_a_model_that_writes_over_an_output_is_exact(kind: str, write: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = make_model(kind)
    attention, batch = model.model.layers[0].self_attn, make_batch((8, 6, 7))
    attention.o_proj = InPlace(attention.o_proj, write)
    gradients, oracle = GradientCapture(model).run(batch), dense(model, batch)
    weights = torch.tensor([0.3, 0.0, 1.7])
    assert relative_error(oracle.flat(gradients.weighted_gradient(weights)), oracle.update(weights)) < EXACT
    want = oracle.gram()
    assert relative_error(gradients.gram(range(3), plain), want) < EXACT


def test_what_a_tap_returns_is_no_view() -> None:
    """torch lets nobody write over a view that a function of ours returned."""
    model = make_model("gpt2")
    capture, seen = GradientCapture(model), dict[str, bool]()
    names = {name: module for name, module in model.named_modules() if module._forward_hooks}
    for name, module in names.items():
        module.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output._is_view()}))
    capture.run(make_batch((6, 5)))
    assert seen == dict.fromkeys(names, False)
    assert {"transformer.wte", "transformer.h.0.attn.c_attn", "transformer.ln_f"} <= seen.keys()


def test_a_norm_of_any_class_name_is_covered() -> None:
    model = make_model("llama")
    model.model.norm = RenamedNorm()
    batch = make_batch((8, 6))
    update = GradientCapture(model).run(batch).weighted_gradient(torch.ones(2))
    oracle = dense(model, batch)
    assert relative_error(oracle.flat(update), oracle.gradients.sum(0)) < EXACT


def test_a_module_called_twice_adds_up() -> None:
    model = make_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    batch = make_batch((8, 6, 7))
    gradients = GradientCapture(model).run(batch)
    oracle = dense(model, batch)
    assert len(gradients.factors["model.layers.0.mlp.down_proj.weight"]) == 2
    want = oracle.gram()
    assert relative_error(gradients.gram(range(3), plain), want) < EXACT


@pytest.mark.parametrize(("lengths", "factor"), [((12, 7, 9), Written), ((2, 2, 2), Outer)])
def test_adapters_are_written_out_where_that_is_smaller(lengths: tuple[int, ...], factor: type) -> None:
    """3 x 16 weights a sample against 19 numbers a token; exact either way."""
    model, batch = make_model("lora"), make_batch(lengths, prompt=0)
    capture = GradientCapture(model)
    gradients, oracle = capture.run(batch), dense(model, batch)
    narrow = [name for name, shape in gradients.shapes.items() if sorted(shape) == [3, 16]]
    assert narrow
    assert {type(f) for name in narrow for f in gradients.factors[name]} == {factor}
    target = random_like(capture, 6)
    assert (
        relative_error(Interaction(gradients, target, plain).utilities_N, oracle.gradients @ oracle.flat(target))
        < EXACT
    )
    want = oracle.gram()
    assert relative_error(gradients.gram(range(3), plain), want) < EXACT
    weights = torch.tensor([0.3, 0.0, 1.7])
    assert relative_error(oracle.flat(gradients.weighted_gradient(weights)), oracle.update(weights)) < EXACT


@pytest.mark.parametrize(("kind", "matrix"), [("llama", "weight"), ("lora", "lora_A.default.weight")])
def test_nothing_of_a_pass_is_kept(kind: str, matrix: str) -> None:
    """A stash that grows with every step is how a peer lost 20 GB a step."""
    capture = GradientCapture(make_model(kind))
    gradients = capture.run(make_batch((6, 6)))
    factor = weakref.ref(gradients.factors[f"model.layers.0.mlp.down_proj.{matrix}"][0])
    del gradients
    gc.collect()
    assert factor() is None


def test_no_weight_gradient_is_computed_while_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    capture = GradientCapture(model)
    wanted: list[bool] = []
    forward = model.base_model.forward

    def spy(**inputs: object) -> object:
        wanted.append(any(p.requires_grad for p in model.parameters()))
        return forward(**inputs)

    monkeypatch.setattr(model.base_model, "forward", spy)
    capture.run(make_batch((6, 6)))
    assert wanted == [False]
