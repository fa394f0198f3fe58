"""The engine against loops written out: autograd of the weighted loss, plain AdamW, and itself after a restart."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from gradient_selectors.capture.batch import Batch
from gradient_selectors.engine import SelectionEngine
from gradient_selectors.mask.dual_sft import DualSft
from gradient_selectors.mask.rule import MaskRule
from gradient_selectors.route.gast import Gast
from gradient_selectors.views.interaction import Interaction
from gradient_selectors.views.rank_one import RankOne
from gradient_selectors.views.sketches import Sketched
from gradient_selectors.weigh.baselines import Equal, TopK
from gradient_selectors.weigh.filter_then_weight import FilterThenWeight
from gradient_selectors.weigh.selector import Decision
from gradient_selectors.weigh.stated import reweighted
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.oracle import dense, make_batch, make_model, relative_error

EXACT = 1e-5  # relative, float32
LENGTHS = (9, 7, 12, 8, 6, 10)
COEFFICIENTS = torch.tensor([0.4, 0.0, 0.1, 0.3, 0.0, 0.2])


@dataclass(frozen=True)
class Given:
    """Coefficients that are given."""

    coefficients_N: Tensor
    needs_target: ClassVar[bool] = False

    def decide(self, _: Interaction) -> Decision:
        return Decision(self.coefficients_N)


def collated(batch: Batch, **others: Any) -> dict[str, Any]:
    """What a data collator makes of it, with labels on the padding, which the mask rules out."""
    positions = torch.arange(batch.input_ids_NT.shape[1])
    mask = (positions < torch.tensor(batch.lengths)[:, None]).long()
    return {
        "input_ids": batch.input_ids_NT,
        "labels": batch.labels_NT.masked_fill(mask == 0, 7),
        "attention_mask": mask,
    } | others


def target_batches(seed: int = 4) -> list[dict[str, Any]]:
    return [collated(make_batch((6, 9, 7), seed=seed)), collated(make_batch((8, 8), seed=seed + 1))]


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, **options)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# What is left in .grad


@pytest.mark.parametrize("kind", ["llama", "qwen2_tied", "gpt2", "lora"])
def test_backward_leaves_the_gradient_of_the_weighted_loss(kind: str) -> None:
    model, batch = make_model(kind), make_batch(LENGTHS)
    oracle = dense(model, batch)
    with SelectionEngine(model, adamw(model), Given(COEFFICIENTS)) as engine:
        decision = engine.backward(collated(batch))
    assert decision.selected == [0, 2, 3, 5]
    found = gradients_of(model)
    assert found.keys() == oracle.parameters.keys()
    assert relative_error(oracle.flat(found), oracle.update(COEFFICIENTS)) < EXACT
    assert relative_error(engine.losses_N, oracle.losses) < EXACT


def plain_training(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch]) -> None:
    """The mean over samples of their mean losses, one sample at a time."""
    for batch in batches:
        optimizer.zero_grad()
        for sample in batch.samples():
            logits = model(input_ids=sample.input_ids_NT, use_cache=False).logits[0]
            loss = F.cross_entropy(logits[:-1], sample.labels_NT[0, 1:]) / len(batch)
            torch.autograd.backward([loss])
        optimizer.step()


@pytest.mark.parametrize("kind", ["llama", "qwen2_tied", "gpt2", "lora"])
def test_equal_coefficients_are_plain_adamw(kind: str) -> None:
    """Against a model in float64. With a large epsilon, so that rounding is not blown up where a gradient is zero."""
    model = make_model(kind)
    reference, start = copy.deepcopy(model).double(), copy.deepcopy(model)
    batches = [make_batch(LENGTHS, seed=seed) for seed in range(4)]
    plain_training(reference, adamw(reference, eps=1e-3), batches)
    optimizer = adamw(model, eps=1e-3)
    engine = SelectionEngine(model, optimizer, Equal())
    for batch in batches:
        assert engine.backward(collated(batch)).coefficients_N.tolist() == pytest.approx([1 / 6] * 6)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in reference.named_parameters():
        before, found = (other.get_parameter(name).detach() for other in (start, model))
        moved, want = found.double() - before, parameter.detach() - before
        assert parameter.requires_grad == bool(want.any())
        if parameter.requires_grad:
            assert relative_error(moved, want) < 1e-3


def test_what_was_in_grad_is_replaced_and_no_more_is_left_than_the_optimizer_needs() -> None:
    model, batch = make_model("llama"), make_batch(LENGTHS)
    engine = SelectionEngine(model, adamw(model), Given(COEFFICIENTS))
    engine.backward(batch)
    want = {name: gradient.clone() for name, gradient in gradients_of(model).items()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 9.0)
    engine.backward(batch)
    assert all(torch.equal(gradient, want[name]) for name, gradient in gradients_of(model).items())


def test_nothing_is_left_where_nothing_helps() -> None:
    model, batch = make_model("llama"), make_batch(LENGTHS)
    engine = SelectionEngine(model, adamw(model), Given(torch.zeros(6)))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert engine.backward(batch).selected == []
    assert gradients_of(model) == {}


def test_a_steered_selector_takes_what_is_like_the_target() -> None:
    """The target's own samples among others."""
    model = make_model("llama")
    own, others = make_batch((9, 9, 9), seed=4), make_batch((9, 9, 9), seed=8)
    engine = SelectionEngine(model, adamw(model), TopK(3), target=[own], reports_utilities=True)
    mixed = Batch(
        torch.cat([others.input_ids_NT, own.input_ids_NT]), torch.cat([others.labels_NT, own.labels_NT]), (9,) * 6
    )
    assert engine.backward(collated(mixed)).selected == [3, 4, 5]
    assert engine.last is not None
    assert engine.last.utilities_N is not None
    # Of the target's own utility, its samples have as much on average.
    assert float(engine.last.utilities_N[3:].mean()) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("scoring", [None, RankOne(), Sketched(8)], ids=["exact", "rank one", "sketched"])
def test_every_scoring_trains(scoring: Any) -> None:
    """A pool that is the target: its loss falls. Adam's preconditioner is used from the second step on."""
    model, batch = make_model("llama"), make_batch(LENGTHS)
    optimizer = adamw(model)
    engine = SelectionEngine(model, optimizer, FilterThenWeight(2), target=[batch], refresh_steps=2, scoring=scoring)
    losses, refreshed = [], []
    for _ in range(6):
        assert 1 <= len(engine.backward(batch).selected) <= 2
        optimizer.step()
        assert engine.last is not None
        losses.append(float(engine.losses_N.mean()))
        refreshed.append(engine.last.target_refreshed)
    assert refreshed == [True, False] * 3
    assert losses[-1] < losses[0]


# What it takes


def test_a_batch_is_what_a_data_collator_makes() -> None:
    """Of any dtype of mask, without one where nothing is padded, or as a Batch: the same gradient."""
    model, batch = make_model("llama"), make_batch(LENGTHS)
    engine = SelectionEngine(model, adamw(model), Given(COEFFICIENTS))
    made = collated(batch)
    ways: list[Any] = [batch, made, made | {"attention_mask": made["attention_mask"].bool()}]
    found = []
    for way in ways:
        engine.backward(way)
        found.append(gradients_of(model))
    for other in found[1:]:
        assert all(torch.equal(other[name], gradient) for name, gradient in found[0].items())
    even = make_batch((8,) * 6)
    engine.backward({"input_ids": even.input_ids_NT, "labels": even.labels_NT})
    bare = gradients_of(model)
    engine.backward(collated(even))
    assert all(torch.equal(gradient, bare[name]) for name, gradient in gradients_of(model).items())


def test_weights_multiply_coefficients() -> None:
    model, batch = make_model("llama"), make_batch(LENGTHS)
    weights = [1.0, 5.0, 2.0, 0.5, 1.0, 1.0]
    engine = SelectionEngine(model, adamw(model), Given(COEFFICIENTS))
    decision = engine.backward(collated(batch, weights=torch.tensor(weights)))
    product = COEFFICIENTS.double() * torch.tensor(weights, dtype=torch.float64)
    want = product / product.sum() * COEFFICIENTS.double().sum()
    assert decision.coefficients_N.tolist() == pytest.approx(want.tolist(), rel=1e-6)
    oracle = dense(model, batch)
    assert relative_error(oracle.flat(gradients_of(model)), oracle.update(want)) < EXACT


def test_weights_multiply_the_coefficients_of_every_layer() -> None:
    model, batch = make_model("llama"), make_batch(LENGTHS)
    weights = torch.tensor([1.0, 9.0, 2.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    engine = SelectionEngine(model, adamw(model), Equal(), target=target_batches(), route=Gast(3))
    decision = engine.backward(collated(batch, weights=weights))
    assert decision.coefficients_LN is not None
    for row_N in decision.coefficients_LN:
        drawn = (row_N > 0).nonzero().squeeze(1)
        assert len(drawn) == 3
        assert row_N[drawn].tolist() == pytest.approx((weights[drawn] / weights[drawn].sum()).tolist(), rel=1e-6)


def test_any_finite_weights_may_be_stated() -> None:
    natural = torch.tensor([[3.0, 1.0], [0.0, 2.0], [0.0, 0.0]])
    for weights in ([1e300, 1e300], [1e-300, 1e-300], [1.0, 1.0]):
        found = reweighted(natural, torch.tensor(weights, dtype=torch.float64))
        torch.testing.assert_close(found, natural, rtol=1e-6, atol=0)
    assert reweighted(natural[0], torch.tensor([1e-300, 1e300], dtype=torch.float64)).tolist() == [0.0, 4.0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda b: b | {"attention_mask": b["attention_mask"].flip(1)}, "padded on the right.*padding_side='right'"),
        (lambda b: b | {"token_type_ids": b["labels"]}, "a batch of token_type_ids is not understood"),
        (lambda b: {name: v for name, v in b.items() if name != "labels"}, "a batch needs labels"),
        (lambda b: b | {"labels": None}, "a batch needs labels"),
        (lambda b: {"labels": b["labels"]}, "a batch needs input_ids"),
        (lambda b: b | {"labels": b["labels"][:, 1:]}, r"must be \(N, T\), not \(6, 12\), \(6, 11\), \(6, 12\)"),
        (lambda b: {name: v[0] for name, v in b.items()}, r"must be \(N, T\), not \(12,\)"),
        (lambda b: b | {"labels": torch.full_like(b["labels"], -100)}, "every sample needs at least one label"),
    ],
    ids=["left", "unknown", "no labels", "labels none", "no ids", "shapes", "one sample", "no loss"],
)
def test_a_batch_that_is_not_understood_is_refused(
    change: Callable[[dict[str, Any]], dict[str, Any]], says: str
) -> None:
    model = make_model("llama")
    engine = SelectionEngine(model, adamw(model), Equal())
    with pytest.raises(ValueError, match=says):
        engine.backward(change(collated(make_batch(LENGTHS))))


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"selector": TopK(2)}, "TopK is steered by a target; give target=batches"),
        ({"route": Gast(1)}, "target=batches"),
        ({"reports_utilities": True}, "target=batches"),
        ({"target": []}, "the target holds no sample"),
        ({"target": target_batches(), "mask": DualSft(MaskRule(0.1))}, "needs the optimizer MaskedAdamW, not AdamW"),
    ],
    ids=["selector", "route", "utilities", "empty", "mask"],
)
def test_parts_that_do_not_go_together_are_refused(parts: dict[str, Any], says: str) -> None:
    model = make_model("llama")
    with pytest.raises(ValueError, match=says):
        SelectionEngine(model, adamw(model), **({"selector": Equal()} | parts))
    assert not any(module._forward_hooks for module in model.modules())


def test_losses_before_any_pool_are_refused() -> None:
    model = make_model("llama")
    engine = SelectionEngine(model, adamw(model), Equal())
    with pytest.raises(ValueError, match="call backward first"):
        _ = engine.losses_N


def test_closing_takes_the_hooks_off() -> None:
    model = make_model("llama")
    before = model(input_ids=make_batch((6,)).input_ids_NT).logits
    with SelectionEngine(model, adamw(model), Equal()) as engine:
        assert any(module._forward_hooks for module in model.modules())
        engine.backward(make_batch(LENGTHS))
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())
    assert torch.equal(model(input_ids=make_batch((6,)).input_ids_NT).logits, before)


def test_sgd_works() -> None:
    """Its preconditioner is plain: what is selected are the samples with the largest inner products."""
    model, batch = make_model("llama"), make_batch(LENGTHS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    engine = SelectionEngine(model, optimizer, TopK(2), target=target_batches(), refresh_steps=1)
    for _ in range(3):
        of_target = torch.cat([dense(model, Batch.of(part)).gradients for part in target_batches()]).mean(0)
        utilities_N = dense(model, batch).gradients @ of_target
        assert engine.backward(batch).selected == sorted(utilities_N.topk(2).indices.tolist())
        optimizer.step()


def test_an_optimizer_that_is_not_known_is_named() -> None:
    model = make_model("llama")
    engine = SelectionEngine(model, torch.optim.Adagrad(model.parameters()), TopK(2), target=target_batches())
    with pytest.raises(ValueError, match="the preconditioner of Adagrad is not known; use torch's AdamW"):
        engine.backward(make_batch(LENGTHS))


def test_a_sample_that_is_not_finite_spoils_nothing() -> None:
    model, batch = make_model("llama"), make_batch(LENGTHS)
    with torch.no_grad():
        model.model.embed_tokens.weight[299] = float("nan")
    batch.input_ids_NT[2, 3] = 299
    engine = SelectionEngine(model, adamw(model), Equal())
    assert engine.backward(batch).coefficients_N.tolist() == pytest.approx([0.2, 0.2, 0.0, 0.2, 0.2, 0.2])
    assert bool(torch.isfinite(engine.losses_N).tolist() == [True, True, False, True, True, True])
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients_of(model).values())
