"""The comparison of an update with a uniform one, against dense gradients."""

import pytest
import torch
from gradient_selectors import FilterThenWeight, SelectionEngine, Sketched
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.target import Target
from gradient_selectors.views.advantage import compare
from torch import Tensor

from tests.helpers.oracle import dense, make_batch, make_model, random_like

LENGTHS = (8, 6, 9, 7)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["llama", "qwen2_tied", "gpt2", "lora"])
def test_both_sides_are_utilities_by_the_length_of_their_updates(kind: str) -> None:
    model = make_model(kind)
    capture, batch = GradientCapture(model), make_batch(LENGTHS)
    oracle = dense(model, batch)
    preconditioner, choosing, fresh = (random_like(capture, seed) for seed in (5, 6, 7))
    p, g, old = oracle.flat(preconditioner).abs(), oracle.flat(fresh), oracle.flat(choosing)
    coefficients = torch.tensor([0.25, 0.0, 0.75, 0.0])
    drawn = torch.randperm(4, generator=generator())[:2]
    uniform = torch.zeros(4).index_fill_(0, drawn, 0.5)

    def aligned(weights: Tensor) -> float:
        update = weights.double() @ oracle.gradients
        return float(update @ (p * g) / (update @ (p * update)).sqrt())

    positive = {name: values.abs() for name, values in preconditioner.items()}
    found = compare(capture.run(batch), coefficients, (choosing, fresh), positive.__getitem__, generator())
    assert found is not None
    assert found.chosen == pytest.approx(aligned(coefficients), rel=1e-3)
    assert found.uniform == pytest.approx(aligned(uniform), rel=1e-3)
    assert found.agreement == pytest.approx(
        float(old @ (p * g) / ((old @ (p * old)) * (g @ (p * g))).sqrt()), rel=1e-3, abs=1e-6
    )


def test_there_is_nothing_to_compare_where_nothing_was_chosen() -> None:
    model = make_model("llama")
    capture = GradientCapture(model)
    gradients, target = capture.run(make_batch(LENGTHS)), random_like(capture, 5)
    assert compare(gradients, torch.zeros(4), (target, target), lambda _: None, generator()) is None


@pytest.mark.parametrize("pieces", [None, 20])
@pytest.mark.parametrize("sketched", [False, True])
def test_a_comparison_changes_nothing_else(pieces: int | None, sketched: bool) -> None:
    left: list[dict[str, Tensor]] = []
    for rival in (None, generator()):
        model = make_model("llama")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        engine = SelectionEngine(
            model,
            optimizer,
            FilterThenWeight(batch_size=2),
            target=Target.of([make_batch((7, 8, 6, 9), seed=3)], refresh_samples=2),
            scoring=Sketched(4) if sketched else None,
            micro_tokens=pieces,
            factors_bytes=None if pieces is None else 0,
        )
        for seed in range(4):
            engine.backward(make_batch(LENGTHS, seed=seed), rival=rival)
            assert engine.last is not None
            assert (engine.last.comparison is None) == (rival is None)
            optimizer.step()
            optimizer.zero_grad()
        left.append({name: values.detach().clone() for name, values in model.named_parameters()})
    assert all(torch.equal(left[0][name], left[1][name]) for name in left[0])


def test_what_the_target_wants_is_worth_more_than_chance() -> None:
    """The pool holds one sample of the target's kind, and the next samples of the target are of it too."""
    model = make_model("llama")
    capture = GradientCapture(model)
    batch = make_batch(LENGTHS)
    wanted = dict(capture.run(batch).weighted_gradient(torch.tensor([0.0, 0.0, 1.0, 0.0])))
    pool = capture.run(batch)
    found = compare(pool, torch.tensor([0.0, 0.0, 1.0, 0.0]), (wanted, wanted), lambda _: None, generator(1))
    assert found is not None
    assert found.agreement == pytest.approx(1, rel=1e-5)
    assert found.chosen > found.uniform
