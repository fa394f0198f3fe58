"""Mixtures of experts trained in full: every view of the gradients of routers and experts against autograd."""

from typing import Any

import pytest
import torch
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.parts.expert_factors import ExpertOuter
from gradient_selectors.capture.pieces import add_weighted_gradient, pieces_of
from gradient_selectors.preconditioner import plain
from gradient_selectors.views import pieces
from gradient_selectors.views.interaction import Interaction
from gradient_selectors.views.pieces import Budget, score_pool
from gradient_selectors.views.scoring import Exact
from torch import nn

from stream_trainer.models.loading import load_model
from stream_trainer.settings.schema import LoraSettings, ModelSettings
from tests.families.configurations import BY_TITLE
from tests.helpers.oracle import dense, make_batch, random_like, relative_error
from tests.helpers.tiny_models import shake

LENGTHS = (12, 7, 9, 5)
EXACT = 1e-5
FAMILIES = ("Mixtral", "Qwen 2 MoE", "OLMoE", "gpt-oss", "DeepSeek V3 and R1")


def make_model(title: str, **settings: Any) -> Any:
    model = load_model(ModelSettings(config=BY_TITLE[title].config, tokenizer="bytes", **settings), seed=0).model
    shake(model, frozen=True)
    return model


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("title", FAMILIES)
def test_rows_gram_and_update_agree_with_autograd(title: str, lora: bool) -> None:
    model = make_model(title, lora=LoraSettings(rank=3, alpha=4.0) if lora else None)
    capture, batch = GradientCapture(model), make_batch(LENGTHS)
    gradients, oracle = capture.run(batch), dense(model, batch)
    preconditioner, target = random_like(capture, 5), random_like(capture, 6)
    interaction = Interaction(gradients, target, preconditioner.__getitem__)
    direction = oracle.flat(preconditioner) * oracle.flat(target)
    assert relative_error(gradients.losses_N, oracle.losses) < EXACT
    assert relative_error(interaction.utilities_N, oracle.gradients @ direction) < EXACT
    want = oracle.gram(preconditioner)
    assert relative_error(interaction.gram([2, 0, 3]), want[[2, 0, 3]][:, [2, 0, 3]]) < EXACT
    weights = torch.tensor([0.1, 0.0, 0.7, 1.3])
    assert relative_error(oracle.flat(gradients.weighted_gradient(weights)), oracle.update(weights)) < EXACT
    assert any(isinstance(f, ExpertOuter) for found in gradients.factors.values() for f in found) is not lora


@pytest.mark.parametrize("checkpointing", [False, True])
def test_pieces_of_a_pool_add_up(checkpointing: bool) -> None:
    model = make_model("gpt-oss", gradient_checkpointing=checkpointing)
    capture, batch = GradientCapture(model), make_batch(LENGTHS)
    weights, total = torch.tensor([0.1, 0.4, 0.7, 1.3]), dict[str, torch.Tensor]()
    for piece in pieces_of(LENGTHS, micro_tokens=12):
        add_weighted_gradient(total, capture, batch.among(piece), weights[list(piece)])
    oracle = dense(model, batch)
    assert relative_error(oracle.flat(total), oracle.update(weights)) < EXACT


def test_factors_of_experts_count_towards_what_may_be_kept() -> None:
    """A budget that the other matrices would fit lets some of them go, for experts take their part of it."""
    model = make_model("Qwen 3 MoE")
    capture, batch = GradientCapture(model), make_batch(LENGTHS)
    gradients = capture.run(batch)
    factors = [factor for found in gradients.factors.values() for factor in found]
    kept = sum(f.left_Sp.nbytes + f.right_Sd.nbytes for f in factors if isinstance(f, ExpertOuter))
    counted = 4 * sum(LENGTHS) * sum(experts.numbers_of_token for experts in capture.experts)
    assert kept == counted
    others = 4 * sum(LENGTHS) * (sum(sum(capture.parameters[n].shape) for n in capture.matrices) + 300)
    target = random_like(capture, 6)
    for budget, lets_go in ((kept + others, False), (kept + others - 4, True), (others, True)):
        pool = score_pool(capture, batch, Exact(), target, plain, Budget(None, budget))
        forms = pieces._forms(capture, LENGTHS, [(0, 1, 2, 3)], budget)
        assert (forms != ["factors"]) is lets_go
        assert relative_error(pool.losses_N, gradients.losses_N) < EXACT


def test_a_sample_of_weight_zero_leaves_no_trace() -> None:
    model = make_model("Mixtral")
    gradients = GradientCapture(model).run(make_batch(LENGTHS))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    (factor,) = gradients.factors[name]
    assert isinstance(factor, ExpertOuter)
    want = gradients.weighted_gradient_of(name, torch.tensor([0.5, 0.0, 1.0, 2.0]))
    factor.left_Sp[factor.dispatch.owners_S == 1] = torch.nan
    assert torch.equal(gradients.weighted_gradient_of(name, torch.tensor([0.5, 0.0, 1.0, 2.0])), want)


def test_an_expert_that_nothing_was_sent_to_has_no_gradient() -> None:
    model = make_model("Mixtral")
    gradients = GradientCapture(model).run(make_batch((3,), prompt=1))
    (factor,) = gradients.factors["model.layers.0.mlp.experts.down_proj"]
    assert isinstance(factor, ExpertOuter)
    used = {expert for expert, _ in factor.dispatch.used()}
    idle = sorted(set(range(4)) - used)
    written = factor.per_sample([0], 0, 4)
    assert idle
    assert not written[0, idle].any()
    assert written[0, sorted(used)].any()


def test_some_of_the_experts_weights_may_be_frozen() -> None:
    model = make_model("Qwen 2 MoE", freeze=("*.experts.down_proj", "*.mlp.gate.weight"))
    capture, batch = GradientCapture(model), make_batch(LENGTHS)
    assert not any(name.endswith(("experts.down_proj", "mlp.gate.weight")) for name in capture.parameters)
    oracle, weights = dense(model, batch), torch.ones(4)
    assert relative_error(oracle.flat(capture.run(batch).weighted_gradient(weights)), oracle.update(weights)) < EXACT


def test_a_product_in_the_midst_of_a_module_is_covered() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    model = load_model(ModelSettings(config=BY_TITLE["Llama 1 to 3"].config, tokenizer="bytes"), seed=0).model
    model.model.layers[1].self_attn.o_proj = Doubled(16, 16)  # type: ignore[union-attr,index]
    batch = make_batch(LENGTHS)
    gradients, oracle = GradientCapture(model).run(batch), dense(model, batch)
    assert relative_error(gradients.gram(range(4), plain), oracle.gram()) < EXACT


def test_passes_in_bfloat16_keep_the_order_of_the_scores() -> None:
    model = make_model("Qwen 2 MoE")
    capture, batch = GradientCapture(model, autocast=torch.bfloat16), make_batch((16,) * 6)
    target, oracle = random_like(capture, 3), dense(model, batch)
    got = Interaction(capture.run(batch), target, plain).utilities_N
    want = oracle.gradients @ oracle.flat(target)
    assert float(torch.corrcoef(torch.stack([got.double(), want]))[0, 1]) > 0.99
