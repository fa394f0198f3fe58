"""The views of the interaction matrix against the matrix itself, and updates whose rows are weighted layer by layer."""

from collections.abc import Sequence

import pytest
import torch
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.gradients import PoolGradients, layer_of
from gradient_selectors.preconditioner import Preconditioner, plain
from gradient_selectors.views.interaction import Interaction
from gradient_selectors.views.scoring import Exact
from gradient_selectors.weigh.selector import Decision
from torch import Tensor

from tests.helpers.oracle import dense, make_batch, make_model, random_like, relative_error

EXACT = 1e-5  # relative, float32
LENGTHS = (8, 6, 9)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3"),
        ("model.layers.13.mlp.experts.2.weight", "model.layers.13"),
        ("transformer.h.0.attn.c_attn.bias", "transformer.h.0"),
        ("base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight", "base_model.model.model.layers.1"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("lm_head.weight", "lm_head"),
        ("w", "w"),
    ],
)
def test_a_parameter_belongs_to_its_block_or_its_module(name: str, layer: str) -> None:
    assert layer_of(name) == layer


@pytest.mark.parametrize("kind", ["llama", "qwen2_tied", "gpt2", "lora"])
def test_views_are_sums_of_the_matrix(kind: str) -> None:
    model = make_model(kind)
    capture, batch = GradientCapture(model), make_batch(LENGTHS)
    oracle = dense(model, batch)
    preconditioner, target = random_like(capture, 5), random_like(capture, 6)
    interaction = Interaction(capture.run(batch), target, preconditioner.__getitem__)
    matrix = oracle.gradients * oracle.flat(preconditioner) * oracle.flat(target)
    owners = [layer_of(name) for name, p in oracle.parameters.items() for _ in range(p.numel())]
    layers = interaction.gradients.layers
    assert len(layers) == len(set(owners))
    by_layer = torch.stack([matrix[:, [owner == layer for owner in owners]].sum(1) for layer in layers])
    assert relative_error(interaction.utilities_LN, by_layer) < EXACT
    assert relative_error(interaction.utilities_LN.sum(0), interaction.utilities_N) < EXACT
    weights = torch.tensor([0.2, 0.0, 1.3])
    columns = oracle.flat(dict(interaction.columns(weights)))
    assert relative_error(columns, weights.double() @ matrix) < EXACT
    assert float(columns.sum()) == pytest.approx(float(interaction.utilities_N.double() @ weights.double()), rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen2_tied", "lora"])
def test_rows_may_be_weighted_layer_by_layer(kind: str) -> None:
    model = make_model(kind)
    capture, batch = GradientCapture(model), make_batch(LENGTHS)
    gradients, oracle = capture.run(batch), dense(model, batch)
    weights_LN = torch.rand(len(gradients.layers), 3, generator=torch.Generator().manual_seed(0))
    weights_LN[weights_LN < 0.3] = 0
    rows = torch.cat(
        [
            weights_LN[gradients.layers.index(layer_of(name))].unsqueeze(1).expand(3, p.numel())
            for name, p in oracle.parameters.items()
        ],
        dim=1,
    )
    update = gradients.weighted_gradient(weights_LN)
    assert relative_error(oracle.flat(update), (rows * oracle.gradients).sum(0)) < EXACT


def test_one_layers_weights_move_one_layers_gradient() -> None:
    capture = GradientCapture(make_model("llama"))
    gradients = capture.run(make_batch(LENGTHS))
    row = gradients.layers.index("model.layers.1")
    weights_LN = torch.ones(len(gradients.layers), 3)
    before = gradients.weighted_gradient(weights_LN)
    weights_LN[row, 0] = 0
    after = gradients.weighted_gradient(weights_LN)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("model.layers.1.")}


def test_chosen_are_the_samples_that_some_layer_uses() -> None:
    coefficients_N = torch.tensor([0.5, 0.5, 0.0])
    routed = Decision(coefficients_N, coefficients_LN=torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    assert Decision(coefficients_N).selected == [0, 1]
    assert routed.selected == [0]


class Sevens(Exact):
    """Sees sevens everywhere, and two of the target's own."""

    def utilities(self, gradients: PoolGradients, *_: object) -> dict[str, Tensor]:
        return {"model.norm.weight": torch.full((gradients.num_samples,), 7.0)}

    def gram(self, _: PoolGradients, samples: Sequence[int], __: Preconditioner) -> Tensor:
        return torch.full((len(samples), len(samples)), 7.0)

    def squared_length(self, *_: object) -> float:
        return 2.0


def test_views_are_computed_as_the_interaction_is_told() -> None:
    gradients = GradientCapture(make_model("llama")).run(make_batch(LENGTHS))
    interaction = Interaction(gradients, {}, plain, Sevens())
    assert interaction.gram([0, 2]).tolist() == [[7.0, 7.0], [7.0, 7.0]]
    assert interaction.utilities_N.tolist() == [7.0] * 3
    assert interaction.relative_utilities_N.tolist() == [3.5] * 3
    assert interaction.utilities_LN.sum(0).tolist() == [7.0] * 3


def test_a_target_without_any_gradient_gives_nothing() -> None:
    capture = GradientCapture(make_model("llama"))
    zero = {name: torch.zeros_like(parameter) for name, parameter in capture.parameters.items()}
    assert Interaction(capture.run(make_batch(LENGTHS)), zero, plain).relative_utilities_N.tolist() == [0.0] * 3
