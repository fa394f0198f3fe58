"""Sketches: exact utilities where the target has the rank, heads by the way of the pass, unbiased redundancy."""

import pytest
import torch
from gradient_selectors.capture import GradientCapture
from gradient_selectors.geometry import Geometry, plain
from gradient_selectors.gradients import PoolGradients, _products
from gradient_selectors.interaction import Interaction
from gradient_selectors.sketches import Projection, Sketches, from_tensors, low_rank, project, to_tensors
from oracle import dense, make_batch, make_model, random_like, relative_error
from pools import outer_pool
from torch import Tensor

LENGTHS = (8, 6, 7)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sketched(capture: GradientCapture, geometry: Geometry, target: dict[str, Tensor], seed: int) -> Interaction:
    projections = project(target, geometry, seeded(seed), width=8, head=capture.head)
    head = projections.get(capture.head or "")
    gradients = capture.run(make_batch(LENGTHS), None if head is None else head.direction)
    sketches = Sketches(gradients, projections, geometry)
    return Interaction(gradients, target, geometry, sketches.gram, sketches.rows)


def of_low_rank(like: dict[str, Tensor], rank: int, seed: int) -> dict[str, Tensor]:
    """Every matrix of a low rank, vectors as they are."""
    generator = seeded(seed)
    return {
        name: torch.randn(len(values), rank, generator=generator)
        @ torch.randn(rank, values.shape[1], generator=generator)
        if values.ndim == 2
        else values
        for name, values in like.items()
    }


@pytest.mark.parametrize("kind", ["llama", "qwen2_tied", "gpt2", "gemma2_capped"])
def test_utilities_are_exact_where_the_direction_has_the_rank(kind: str) -> None:
    """Against dense gradients; P of rank one leaves the direction's rank as it is. Heads count, tied ones too."""
    model = make_model(kind)
    capture = GradientCapture(model)
    target = of_low_rank(random_like(capture, 6), 3, 6)
    scales = {name: values.abs() + 0.1 for name, values in of_low_rank(random_like(capture, 5), 1, 5).items()}
    preconditioner = {
        n: v.abs().mean(1, keepdim=True) * v.abs().mean(0) if v.ndim == 2 else v for n, v in scales.items()
    }
    oracle = dense(model, make_batch(LENGTHS))
    exact_N = oracle.gradients.double() @ (oracle.flat(preconditioner) * oracle.flat(target)).double()
    found = sketched(capture, preconditioner.__getitem__, target, 0)
    assert relative_error(found.rows_N.double(), exact_N) < 1e-3
    assert found.rows_by_parameter.keys() == set(capture.parameters)


@pytest.mark.parametrize("kind", ["llama", "qwen2_tied"])
def test_the_head_is_the_same_whether_the_pass_knew_its_direction(kind: str) -> None:
    capture = GradientCapture(make_model(kind))
    target = random_like(capture, 6)
    projections = project(target, plain, seeded(0), width=8, head=capture.head)
    assert capture.head is not None
    direction = projections[capture.head].direction
    during, after = (capture.run(make_batch(LENGTHS), known) for known in (direction, None))

    def rows(gradients: PoolGradients, projections: dict[str, Projection]) -> dict[str, Tensor]:
        return Sketches(gradients, projections, plain).rows(gradients, target, plain)

    torch.testing.assert_close(rows(during, projections), rows(after, projections), rtol=1e-4, atol=1e-6)
    other = project(target, plain, seeded(1), width=8, head=capture.head)
    stale, fresh = rows(during, other), rows(after, other)
    torch.testing.assert_close(stale, fresh, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_the_direction_is_almost_the_best_of_its_rank(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=seeded(0)) @ torch.diag(0.9 ** torch.arange(shape[1]).float())
    found = low_rank(matrix, 10, seeded(1))
    best = float(torch.linalg.svdvals(matrix)[10:].norm())
    assert float((found.left_pr @ found.right_dr.T - matrix).norm()) < 1.25 * best


def test_projections_come_back_from_a_checkpoint() -> None:
    capture = GradientCapture(make_model("qwen2_tied"))
    target = random_like(capture, 6)
    projections = project(target, plain, seeded(0), width=8, head=capture.head)
    again = from_tensors({name: values.clone() for name, values in to_tensors(projections).items()})
    gradients = capture.run(make_batch(LENGTHS))
    before, after = Sketches(gradients, projections, plain), Sketches(gradients, again, plain)
    torch.testing.assert_close(after.rows(gradients, target, plain), before.rows(gradients, target, plain))
    torch.testing.assert_close(after.gram(gradients, [0, 2], plain), before.gram(gradients, [0, 2], plain))


def test_the_head_is_left_out_of_the_gram_matrix_too() -> None:
    capture = GradientCapture(make_model("qwen2_tied"))
    assert capture.head is not None
    target = random_like(capture, 6)
    draws = [sketched(capture, plain, target, seed) for seed in range(80)]
    gradients = draws[0].gradients
    exact = gradients.gram(range(3), plain) - gradients.gram_of(capture.head, range(3), plain)
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
        projection = projections["a.0.weight"]
        assert projection.left_pk is not None
        assert projection.right_dk is not None
        projected = (projection.left_pk.T @ rows["a.0.weight"] @ projection.right_dk)[[0, 2]].flatten(1)
        found = Sketches(pool, projections, plain).gram(pool, [0, 2], plain)
        torch.testing.assert_close(found, (projected @ projected.T).double(), rtol=1e-4, atol=1e-4)


def test_under_a_mask_everything_is_exact() -> None:
    """Projections would drown the few weights that may move in the noise of all others."""
    pool, _ = outer_pool({"a.0.weight": (24, 32)}, (5, 7))
    target = {"a.0.weight": torch.randn(24, 32, generator=seeded(1))}
    mask = {"a.0.weight": (torch.rand(24, 32, generator=seeded(3)) < 0.05).float()}
    geometry = mask.__getitem__
    sketches = Sketches(pool, project(target, geometry, seeded(2), width=4), geometry)
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
    sketches = Sketches(pool, project(target, plain, seeded(2), width=4), plain)
    with pytest.raises(AssertionError, match="one geometry"):
        sketches.rows(pool, target, target.__getitem__)


def test_sketches_of_one_pool_are_not_taken_for_another() -> None:
    (pool, _), (other, _) = (outer_pool({"a.0.weight": (24, 32)}, lengths) for lengths in ((5, 7), (6, 6)))
    target = {"a.0.weight": torch.ones(24, 32)}
    sketches = Sketches(pool, project(target, plain, seeded(2), width=4), plain)
    with pytest.raises(AssertionError, match="one pool"):
        sketches.gram(other, [0, 1], plain)


def test_products_of_few_long_rows_are_exact_to_rounding() -> None:
    """Plain float32 products of such rows were off by 1e-4 and more."""
    rows = torch.randn(4, 400_003, generator=seeded(0)) + 0.3
    assert relative_error(_products(rows), rows.double() @ rows.double().T) < 1e-6
