"""Approximate Gram matrices: exact where they claim to be, unbiased where random, and honest about the rest."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from gradient_selectors.capture import gradients as written
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.factors import Outer, Segments
from gradient_selectors.capture.gradients import PoolGradients
from gradient_selectors.fidelity import fidelity, seen_as
from gradient_selectors.preconditioner import Geometry, plain, rank_one
from gradient_selectors.views import rank_one as approximate
from gradient_selectors.views.interaction import Interaction
from gradient_selectors.views.rank_one import ghost_gram, ghost_is_cheaper, rank_one_gram
from gradient_selectors.views.sketches import Sketches, project
from gradient_selectors.weigh.coefficients import CoefficientSolver
from torch import Tensor

from tests.helpers.oracle import dense, make_batch, make_model, random_like, relative_error
from tests.helpers.pools import outer_factor, outer_pool, per_sample

EXACT = 1e-5
LENGTHS = (5, 9, 3, 7)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sketch_gram(gradients: PoolGradients, samples: Sequence[int], geometry: Geometry, width: int, seed: int) -> Tensor:
    """K of a pool from sketches."""
    target = {name: torch.zeros(shape) for name, shape in gradients.shapes.items()}
    projections = project(target, geometry, seeded(seed), width)
    return Sketches(gradients, projections, geometry).gram(gradients, samples, geometry)


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
    rows = oracle.gradients.double()[[2, 0, 1]]
    assert relative_error(got, (rows * oracle.flat(preconditioner)) @ rows.T) < EXACT


@pytest.mark.parametrize("mode", [rank_one_gram, partial(sketch_gram, width=4, seed=0)])
def test_adapters_are_exact_under_any_preconditioner(mode: written.GramMode) -> None:
    model = make_model("lora")
    capture, batch = GradientCapture(model), make_batch((8, 6, 7))
    preconditioner, oracle = random_like(capture, 5), dense(model, batch)
    got = mode(capture.run(batch), range(3), preconditioner.__getitem__)
    rows = oracle.gradients.double()
    assert relative_error(got, (rows * oracle.flat(preconditioner)) @ rows.T) < EXACT


def test_a_module_called_twice_keeps_its_cross_terms() -> None:
    model = make_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    batch = make_batch((8, 6, 7))
    oracle = dense(model, batch)
    got = rank_one_gram(GradientCapture(model).run(batch), range(3), plain)
    assert relative_error(got, oracle.gradients.double() @ oracle.gradients.double().T) < EXACT


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


def _first_twice(factor: Outer) -> Outer:
    """Sample 1 becomes a copy of sample 0."""
    index = [*range(6), *range(6), *range(12, 24)]
    return Outer(factor.left_Rp[index], factor.right_Rd[index], Segments(factor.segments.offsets))


def test_the_generator_decides_the_sketch() -> None:
    pool, _ = outer_pool({"a.0.weight": (48, 64)}, LENGTHS)
    first, again, other = (sketch_gram(pool, range(4), plain, width=8, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def noisy_geometry(pool: PoolGradients, spread: float) -> Geometry:
    """Second moments of rank one times log-normal noise of the given standard deviation."""
    generator = seeded(9)
    values = {}
    for name, (p, d) in pool.shapes.items():
        x, y, noise = (torch.randn(size, generator=generator) for size in ((p, 1), (1, d), (p, d)))
        values[name] = torch.exp(-0.5 * (x + y + spread * noise))
    return values.__getitem__


def test_fidelity_falls_as_the_moments_leave_rank_one() -> None:
    pool, dense_rows = outer_pool({"a.0.weight": (24, 32), "a.1.weight": (32, 24)}, LENGTHS)
    target = {name: rows.mean(0) for name, rows in dense_rows.items()}
    exact = [Interaction(pool, target, noisy_geometry(pool, spread)) for spread in (0.0, 0.5, 2.0)]
    reports = [
        fidelity(
            seen_as(view, range(4)), seen_as(replace(view, gram_mode=rank_one_gram), range(4)), CoefficientSolver()
        )
        for view in exact
    ]
    assert reports[0].gram_error < 1e-5
    assert abs(reports[0].utility_lost) < 1e-6
    assert reports[0].rank_correlation == pytest.approx(1.0)
    errors = [report.gram_error for report in reports]
    assert errors == sorted(errors)
    assert reports[1].gram_error < 0.15
    assert reports[1].utility_lost_rescaled < 0.05
    for report in reports:
        assert -1e-9 <= report.utility_lost_rescaled <= report.utility_lost + 1e-9


def test_the_line_search_takes_an_error_of_scale_out() -> None:
    pool, dense_rows = outer_pool({"a.0.weight": (24, 32)}, LENGTHS)
    interaction = Interaction(pool, {name: rows.mean(0) for name, rows in dense_rows.items()}, plain)
    scaled = replace(interaction, gram_mode=lambda g, s, p: 3 * g.gram(s, p))
    report = fidelity(seen_as(interaction, range(4)), seen_as(scaled, range(4)), CoefficientSolver())
    assert report.gram_error == pytest.approx(2.0)
    assert report.utility_lost == pytest.approx(4 / 9, abs=1e-3)  # a third of the best step
    assert abs(report.utility_lost_rescaled) < 1e-6
    assert np.isfinite(report.rank_correlation)


def test_a_table_that_is_not_tied_is_exact_in_a_sketch() -> None:
    capture = GradientCapture(make_model("llama"))
    preconditioner = random_like(capture, 5)
    gradients = capture.run(make_batch((8, 6, 7)))
    table = {"model.embed_tokens.weight": gradients.factors["model.embed_tokens.weight"]}
    alone = PoolGradients(gradients.losses_N, table, gradients.shapes)
    got = sketch_gram(alone, range(3), preconditioner.__getitem__, width=2, seed=0)
    torch.testing.assert_close(got, alone.gram(range(3), preconditioner.__getitem__))
