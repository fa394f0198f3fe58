"""A plain step of the engine against autograd of the mean loss, on several families."""

import pytest
import torch
from gradient_selectors.capture.batch import Batch
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.engine import SelectionEngine
from gradient_selectors.mask.dual_sft import DualSft
from gradient_selectors.mask.masked_adamw import MaskedAdamW
from gradient_selectors.mask.rule import MaskRule
from gradient_selectors.target import Target
from gradient_selectors.weigh.baselines import Equal
from gradient_selectors.weigh.filter_then_weight import FilterThenWeight
from torch import Tensor, nn

from tests.helpers.oracle import dense, make_batch, make_model, relative_error

EXACT = 1e-5  # relative, float32
LENGTHS = (9, 7, 12, 8)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)


def weighted(model: nn.Module, batch: Batch, weights_N: Tensor) -> Tensor:
    """By the oracle, all parameters in a row."""
    return dense(model, batch).update(weights_N)


def assert_left(model: nn.Module, expected: Tensor) -> None:
    left = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    assert relative_error(torch.cat([values.flatten() for values in left]), expected) < EXACT


@pytest.mark.parametrize("kind", ["llama", "qwen2_tied", "gpt2", "gemma2_capped", "lora", "checkpointing"])
def test_train_leaves_the_mean_gradient(kind: str) -> None:
    model, batch = make_model(kind), make_batch(LENGTHS)
    expected, losses_N = weighted(model, batch, torch.full((4,), 0.25)), dense(model, batch).losses
    engine = SelectionEngine(model, adamw(model), Equal())
    decision = engine.train(batch)
    assert decision.coefficients_N.tolist() == [0.25] * 4
    torch.testing.assert_close(engine.losses_N, losses_N.float(), rtol=1e-5, atol=1e-6)
    assert_left(model, expected)


def test_train_overwrites_what_was_in_grad_and_counts_what_samples_state() -> None:
    model, batch = make_model("llama"), make_batch(LENGTHS)
    stated = torch.tensor([1.0, 3.0, 1.0, 5.0], dtype=torch.float64)
    engine = SelectionEngine(model, adamw(model), Equal())
    engine.train(batch)
    engine.train(Batch(batch.input_ids_NT, batch.labels_NT, batch.lengths, stated))
    assert_left(model, weighted(model, batch, (stated / 10).float()))


def test_a_sample_that_is_not_finite_is_left_out() -> None:
    model, batch = make_model("llama"), make_batch(LENGTHS)
    ids = batch.input_ids_NT.clone()
    rare = min(set(range(3, 300)) - set(ids.flatten().tolist()))
    ids[2, 1] = rare
    clean = batch.among([0, 1, 3])
    expected = weighted(model, clean, torch.full((3,), 1 / 3))
    engine = SelectionEngine(model, adamw(model), Equal())
    with torch.no_grad():
        model.get_input_embeddings().weight[rare] = torch.nan
    decision = engine.train(Batch(ids, batch.labels_NT, batch.lengths))
    assert decision.selected == [0, 1, 3]
    assert engine.losses_N.isnan().tolist() == [False, False, True, False]
    assert_left(model, expected)


def test_where_nothing_reads_a_gradient_backward_taps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model("llama"), make_batch(LENGTHS)
    engine = SelectionEngine(model, adamw(model), Equal())
    monkeypatch.setattr(GradientCapture, "run", None)
    assert engine.backward(batch).selected == [0, 1, 2, 3]
    assert engine.last is not None
    assert set(engine.last.seconds) == {"train"}


def test_plain_steps_obey_a_mask_and_feed_its_average_but_never_refresh_it() -> None:
    model, batch = make_model("llama"), make_batch(LENGTHS)
    groups = [{"params": [(name, p) for name, p in model.named_parameters() if p.requires_grad]}]
    optimizer = MaskedAdamW(groups, lr=1e-2)
    mask = DualSft(MaskRule(density=0.1), refresh_steps=1)
    target = Target.of([make_batch((6, 9), seed=4)])
    engine = SelectionEngine(model, optimizer, FilterThenWeight(2), target=target, mask=mask)
    engine.backward(batch)
    optimizer.step()
    kept = {name: optimizer.mask(name) for name in optimizer.parameters}
    for _ in range(3):
        engine.train(batch)
        for name, p in model.named_parameters():
            assert p.grad is not None
            assert not bool(p.grad[kept[name] == 0].any()), name
        optimizer.step()
    assert all(torch.equal(optimizer.mask(name), kept[name]) for name in kept)
    assert mask.age == 3
