"""Sketches: unbiased for the exact utilities under any preconditioner, heads projected during the pass, rest exact."""

import pytest
import torch
from gradient_selectors.capture import GradientCapture
from gradient_selectors.geometry import Geometry, plain
from gradient_selectors.gradients import _products
from gradient_selectors.interaction import Interaction
from gradient_selectors.sketches import Sketches, project
from oracle import dense, make_batch, make_model, random_like, relative_error
from pools import outer_pool
from torch import Tensor

LENGTHS = (8, 6, 7)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sketched(capture: GradientCapture, geometry: Geometry, target: dict[str, Tensor], seed: int) -> Interaction:
    projections = project(target, geometry, seeded(seed), width=8, head=capture.head)
    sketches = Sketches(projections, geometry, capture.head)
    return Interaction(capture.run(make_batch(LENGTHS)), target, geometry, sketches.gram, sketches.rows)


@pytest.mark.parametrize("kind", ["llama", "qwen2_tied", "gpt2", "gemma2_capped"])
def test_utilities_are_unbiased_under_a_preconditioner_of_any_rank(kind: str) -> None:
    """The fit of P has the wrong values; its mean error still vanishes, for the target is scaled the other way.

    A head that is captured on its own path is left out.
    """
    model = make_model(kind)
    capture = GradientCapture(model)
    preconditioner, target = random_like(capture, 5), random_like(capture, 6)
    oracle = dense(model, make_batch(LENGTHS))
    covered = {name: values * float(name != capture.head) for name, values in target.items()}
    exact_N = oracle.gradients.double() @ (oracle.flat(preconditioner) * oracle.flat(covered)).double()
    draws = torch.stack([sketched(capture, preconditioner.__getitem__, target, seed).rows_N for seed in range(80)])
    error = (draws - exact_N).norm(dim=1).mean()
    assert (draws.double().mean(0) - exact_N).norm() < 0.25 * error


def test_the_head_is_left_out_of_the_gram_matrix_too() -> None:
    capture = GradientCapture(make_model("qwen2_tied"))
    assert capture.head is not None
    target = random_like(capture, 6)
    draws = [sketched(capture, plain, target, seed) for seed in range(80)]
    gradients = draws[0].gradients
    exact = gradients.gram(range(3), plain) - gradients.gram_of(capture.head, range(3), None)
    grams = [draw.gram(range(3)) for draw in draws]
    error = sum(relative_error(gram, exact) for gram in grams) / len(grams)
    assert relative_error(torch.stack(grams).mean(0), exact) < 0.3 * error


def test_a_head_by_itself_is_exact() -> None:
    """With nothing else to train there would be nothing to choose by."""
    model = make_model("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "lm_head.weight")
    capture = GradientCapture(model)
    target = random_like(capture, 6)
    found = sketched(capture, plain, target, 0)
    torch.testing.assert_close(found.rows_N, Interaction(found.gradients, target, plain).rows_N)


def test_unequal_and_equal_lengths_are_contracted_alike() -> None:
    shapes = {"a.0.weight": (24, 32)}
    for lengths in ((6, 6, 6), (4, 9, 5)):
        pool, rows = outer_pool(shapes, lengths)
        target = {"a.0.weight": torch.randn(24, 32, generator=seeded(1))}
        projections = project(target, plain, seeded(2), width=16)
        sketches, projection = Sketches(projections, plain), projections["a.0.weight"]
        projected = projection.left_pk.T @ rows["a.0.weight"] @ projection.right_dk
        expected_N = projected.flatten(1) @ projection.target_kk.flatten()
        torch.testing.assert_close(sketches.rows(pool, target, plain)["a.0.weight"], expected_N, rtol=1e-4, atol=1e-4)


def test_under_a_mask_everything_is_exact() -> None:
    """Projections would drown the few weights that may move in the noise of all others."""
    pool, _ = outer_pool({"a.0.weight": (24, 32)}, (5, 7))
    target = {"a.0.weight": torch.randn(24, 32, generator=seeded(1))}
    mask = {"a.0.weight": (torch.rand(24, 32, generator=seeded(3)) < 0.05).float()}
    geometry = mask.__getitem__
    sketches = Sketches(project(target, geometry, seeded(2), width=4), geometry)
    exact = Interaction(pool, target, geometry)
    torch.testing.assert_close(sketches.rows(pool, target, geometry), exact.rows_by_parameter)
    torch.testing.assert_close(sketches.gram(pool, [0, 1], geometry), exact.gram([0, 1]))


def test_adapters_and_vectors_are_exact() -> None:
    capture = GradientCapture(make_model("lora"))
    target, preconditioner = random_like(capture, 6), random_like(capture, 5)
    found = sketched(capture, preconditioner.__getitem__, target, 0)
    exact = Interaction(found.gradients, target, preconditioner.__getitem__)
    torch.testing.assert_close(found.rows_N, exact.rows_N, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.gram(range(3)), exact.gram(range(3)), rtol=1e-4, atol=1e-9)


def test_sketches_of_one_geometry_are_not_taken_for_another() -> None:
    pool, _ = outer_pool({"a.0.weight": (24, 32)}, (5, 7))
    target = {"a.0.weight": torch.ones(24, 32)}
    sketches = Sketches(project(target, plain, seeded(2), width=4), plain)
    with pytest.raises(AssertionError):
        sketches.rows(pool, target, target.__getitem__)


def test_products_of_few_long_rows_are_exact_to_rounding() -> None:
    """Plain float32 products of such rows were off by 1e-4 and more."""
    rows = torch.randn(4, 400_003, generator=seeded(0)) + 0.3
    assert relative_error(_products(rows), rows.double() @ rows.double().T) < 1e-6
