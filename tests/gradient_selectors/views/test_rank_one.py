"""Approximate Gram matrices: exact where they claim to be, unbiased where random, and honest about the rest."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from gradient_selectors.capture import gradients as written
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.factors import Factor, Outer, Segments
from gradient_selectors.capture.gradients import PoolGradients
from gradient_selectors.preconditioner import Preconditioner, plain, rank_one
from gradient_selectors.views import rank_one as approximate
from gradient_selectors.views.interaction import Interaction
from gradient_selectors.views.rank_one import RankOne, ghost_gram, ghost_is_cheaper, rank_one_gram
from gradient_selectors.views.scoring import Exact
from gradient_selectors.views.sketches import Sketched
from torch import Tensor

from tests.helpers.oracle import dense, make_batch, make_model, random_like, relative_error
from tests.helpers.pools import outer_factor, outer_pool, per_sample

EXACT = 1e-5
LENGTHS = (5, 9, 3, 7)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sketch_gram(
    gradients: PoolGradients, samples: Sequence[int], preconditioner: Preconditioner, width: int, seed: int
) -> Tensor:
    """K of a pool from sketches."""
    scoring = Sketched(width, seeded(seed))
    scoring.start({name: torch.zeros(shape) for name, shape in gradients.shapes.items()}, preconditioner, None)
    return scoring.gram(gradients, samples, preconditioner)


def of_rank_one(capture: GradientCapture) -> dict[str, Tensor]:
    """A preconditioner `x y^T` for every matrix, anything for a vector."""
    return {
        name: torch.outer(values[:, 0], values[0]) if values.ndim == 2 else values
        for name, values in random_like(capture, 5).items()
    }


def test_the_fit_recovers_a_preconditioner_of_rank_one() -> None:
    x, y = torch.rand(6, generator=seeded(0)) + 0.1, torch.rand(9, generator=seeded(1)) + 0.1
    scales = rank_one(torch.outer(x, y))
    assert scales is not None
    torch.testing.assert_close(torch.outer(*scales), torch.outer(x, y), rtol=1e-6, atol=0)


def test_a_masked_parameter_has_no_fit() -> None:
    assert rank_one(torch.tensor([[1.0, 0.0], [2.0, 3.0]])) is None


def test_the_fit_is_not_led_astray_by_weights_without_a_gradient() -> None:
    """P of a weight whose second moment is zero is 1 / eps."""
    preconditioner = torch.ones(20, 30)
    preconditioner[3, 4] = 1e8
    scales = rank_one(preconditioner)
    assert scales is not None
    assert float((torch.outer(*scales) - 1).abs().max()) < 0.1


@pytest.mark.parametrize("cheap", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2_tied", "gpt2", "lora", "gemma2_capped"])
def test_rank_one_is_exact_for_rank_one(kind: str, cheap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By token pairs and written out; ties, norms, biases and adapters included."""
    monkeypatch.setattr(approximate, "ghost_is_cheaper", lambda *_: cheap)
    model = make_model(kind)
    capture, batch = GradientCapture(model), make_batch((8, 6, 7))
    preconditioner, oracle = of_rank_one(capture), dense(model, batch)
    got = rank_one_gram(capture.run(batch), [2, 0, 1], preconditioner.__getitem__)
    order = [2, 0, 1]
    assert relative_error(got, oracle.gram(preconditioner)[order][:, order]) < EXACT


@pytest.mark.parametrize("mode", [rank_one_gram, partial(sketch_gram, width=4, seed=0)])
def test_adapters_are_exact_under_any_preconditioner(
    mode: Callable[[PoolGradients, Sequence[int], Preconditioner], Tensor],
) -> None:
    model = make_model("lora")
    capture, batch = GradientCapture(model), make_batch((8, 6, 7))
    preconditioner, oracle = random_like(capture, 5), dense(model, batch)
    got = mode(capture.run(batch), range(3), preconditioner.__getitem__)
    assert relative_error(got, oracle.gram(preconditioner)) < EXACT


def test_a_module_called_twice_keeps_its_cross_terms() -> None:
    model = make_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    batch = make_batch((8, 6, 7))
    oracle = dense(model, batch)
    got = rank_one_gram(GradientCapture(model).run(batch), range(3), plain)
    assert relative_error(got, oracle.gram()) < EXACT


@pytest.mark.parametrize("chunk", [16, 64, 10**6])
def test_token_pairs_equal_gradients_written_out(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "CHUNK_ELEMENTS", chunk)
    factor = outer_factor(LENGTHS, 6, 11, seed=0)
    flat = per_sample(factor).double().flatten(1)
    assert relative_error(ghost_gram(factor), flat @ flat.T) < EXACT


def test_the_cheaper_product_is_chosen_for_every_call() -> None:
    """Few tokens and a large matrix: pairs; many tokens: written out. The first call settles nothing."""
    assert ghost_is_cheaper(256, 8, (576, 1536))
    assert not ghost_is_cheaper(2048, 8, (576, 1536))
    assert not ghost_is_cheaper(256, 8, (8, 4096))


def test_wider_sketches_come_closer_and_copies_stay_copies() -> None:
    pool, _ = outer_pool({"a.0.weight": (48, 64), "a.1.weight": (64, 96)}, (6, 6, 6, 6))
    twice = PoolGradients(pool.losses_N, {n: [_first_twice(f[0])] for n, f in pool.factors.items()}, pool.shapes)
    exact = twice.gram(range(4), plain)

    def error(width: int) -> float:
        grams = [sketch_gram(twice, range(4), plain, width=width, seed=s) for s in range(5)]
        for gram in grams:
            torch.testing.assert_close(gram[0, 0], gram[1, 1], rtol=1e-5, atol=0)
            torch.testing.assert_close(gram[0, 0], gram[0, 1], rtol=1e-5, atol=0)
            assert torch.linalg.eigvalsh(gram)[0] > -1e-5 * float(gram.trace())
        return sum(relative_error(gram, exact) for gram in grams) / len(grams)

    assert error(32) < 0.6 * error(4)


def _first_twice(factor: Factor) -> Outer:
    """Sample 1 becomes a copy of sample 0."""
    assert isinstance(factor, Outer)
    index = [*range(6), *range(6), *range(12, 24)]
    return Outer(factor.left_Rp[index], factor.right_Rd[index], Segments(factor.segments.offsets))


def test_the_generator_decides_the_sketch() -> None:
    pool, _ = outer_pool({"a.0.weight": (48, 64)}, LENGTHS)
    first, again, other = (sketch_gram(pool, range(4), plain, width=8, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_scoring_approximates_redundancy_only() -> None:
    """Utilities and the target's own are exact; K is that of the fit."""
    pool, dense_rows = outer_pool({"a.0.weight": (24, 32), "a.1.weight": (32, 24)}, LENGTHS)
    target = {name: rows.mean(0) for name, rows in dense_rows.items()}
    values = {name: torch.exp(0.3 * torch.randn(shape, generator=seeded(3))) for name, shape in pool.shapes.items()}
    exact, fitted = (Interaction(pool, target, values.__getitem__, scoring) for scoring in (Exact(), RankOne()))
    assert torch.equal(fitted.utilities_N, exact.utilities_N)
    assert torch.equal(fitted.relative_utilities_N, exact.relative_utilities_N)
    assert torch.equal(fitted.gram(range(4)), rank_one_gram(pool, range(4), values.__getitem__))
    assert 1e-3 < relative_error(fitted.gram(range(4)), exact.gram(range(4))) < 0.2


def test_a_table_that_is_not_tied_is_exact_in_a_sketch() -> None:
    capture = GradientCapture(make_model("llama"))
    preconditioner = random_like(capture, 5)
    gradients = capture.run(make_batch((8, 6, 7)))
    table = {"model.embed_tokens.weight": gradients.factors["model.embed_tokens.weight"]}
    alone = PoolGradients(gradients.losses_N, table, gradients.shapes)
    got = sketch_gram(alone, range(3), preconditioner.__getitem__, width=2, seed=0)
    torch.testing.assert_close(got, alone.gram(range(3), preconditioner.__getitem__))
