"""Sketches: exact utilities where the target has the rank, heads by way of the pass, redundancy right in the mean."""

import pytest
import torch
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.gradients import PoolGradients, _products
from gradient_selectors.preconditioner import Geometry, plain
from gradient_selectors.views.interaction import Interaction
from gradient_selectors.views.sketches import Projection, Sketches, from_tensors, low_rank, project, to_tensors
from torch import Tensor

from tests.helpers.oracle import dense, make_batch, make_model, random_like, relative_error
from tests.helpers.pools import outer_pool

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


def masked(capture: GradientCapture, density: float) -> dict[str, Tensor]:
    generator = seeded(3)
    return {
        n: v.abs() * (torch.rand(v.shape, generator=generator) < density) for n, v in random_like(capture, 5).items()
    }


@pytest.mark.parametrize("density", [1.0, 0.2])
def test_projections_come_back_from_a_checkpoint(density: float) -> None:
    capture = GradientCapture(make_model("qwen2_tied"))
    target, geometry = random_like(capture, 6), masked(capture, density).__getitem__
    projections = project(target, geometry, seeded(0), width=8, head=capture.head)
    again = from_tensors({name: values.clone() for name, values in to_tensors(projections).items()})
    assert any(projection.direction is None for projection in projections.values()) == (density < 1)
    gradients = capture.run(make_batch(LENGTHS))
    before, after = Sketches(gradients, projections, geometry), Sketches(gradients, again, geometry)
    torch.testing.assert_close(after.rows(gradients, target, geometry), before.rows(gradients, target, geometry))
    torch.testing.assert_close(after.gram(gradients, [0, 2], geometry), before.gram(gradients, [0, 2], geometry))
    assert after.squared_length(target, geometry) == before.squared_length(target, geometry)


def test_what_an_earlier_version_wrote_is_made_anew() -> None:
    assert from_tensors({"target_pr.w": torch.ones(2, 1), "square.w": torch.ones(()), "left_pk.w": torch.ones(2)}) == {}


@pytest.mark.parametrize("kind", ["llama", "qwen2_tied", "gpt2", "gemma2_capped"])
@pytest.mark.parametrize("density", [1.0, 0.2])
@pytest.mark.parametrize("keep_errors", [True, False], ids=["errors kept", "errors computed again"])
def test_redundancy_is_right_in_the_mean_of_all_draws(
    kind: str, density: float, keep_errors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads count, tied ones too; against autograd, under a P of no low rank and under a mask."""
    if not keep_errors:
        monkeypatch.setattr("gradient_selectors.capture.head.KEPT_ELEMENTS", 0)
    model = make_model(kind)
    capture = GradientCapture(model)
    target, preconditioner = random_like(capture, 6), masked(capture, density)
    oracle = dense(model, make_batch(LENGTHS))
    scaled = oracle.gradients.double() * oracle.flat(preconditioner).double().sqrt()
    exact = (scaled @ scaled.T)[1:, 1:]
    draws = [sketched(capture, preconditioner.__getitem__, target, seed) for seed in range(60)]
    grams = [draw.gram([1, 2]) for draw in draws]
    error = sum(relative_error(gram, exact) for gram in grams) / len(grams)
    assert error < 0.25
    assert relative_error(torch.stack(grams).mean(0), exact) < max(0.3 * error, 1e-4)


def test_a_head_by_itself_is_exact() -> None:
    """With nothing else to train there would be nothing to choose by."""
    model = make_model("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "lm_head.weight")
    capture = GradientCapture(model)
    target = random_like(capture, 6)
    found = sketched(capture, plain, target, 0)
    torch.testing.assert_close(found.rows_N, Interaction(found.gradients, target, plain).rows_N)


@pytest.mark.parametrize("lengths", [(6, 6, 6), (4, 9, 5)])
def test_what_was_drawn_stands_for_all_rows(lengths: tuple[int, ...]) -> None:
    pool, rows = outer_pool({"a.0.weight": (40, 32)}, lengths)
    target = {"a.0.weight": torch.randn(40, 32, generator=seeded(1))}
    projections = project(target, plain, seeded(2), width=16)
    drawn = projections["a.0.weight"].sample.rows_n
    assert len(drawn) == 16
    written = rows["a.0.weight"][[0, 2]][:, drawn].flatten(1)
    found = Sketches(pool, projections, plain).gram(pool, [0, 2], plain)
    torch.testing.assert_close(found, (written @ written.T).double() * 40 / 16, rtol=1e-4, atol=1e-4)


def test_one_row_in_32_is_drawn_of_a_large_matrix() -> None:
    target = {"a.0.weight": torch.randn(640, 20, generator=seeded(1))}
    drawn = project(target, plain, seeded(2), width=4)["a.0.weight"].sample.rows_n
    assert len(drawn) == 20
    assert torch.equal(drawn, drawn.unique())


def test_under_a_mask_utilities_are_exact_and_only_rows_that_may_move_are_drawn() -> None:
    pool, _ = outer_pool({"a.0.weight": (24, 32)}, (5, 7))
    target = {"a.0.weight": torch.randn(24, 32, generator=seeded(1))}
    mask = torch.zeros(24, 32)
    mask[[3, 7, 20]] = 1.0
    geometry = {"a.0.weight": mask}.__getitem__
    sketches = Sketches(pool, project(target, geometry, seeded(2), width=4), geometry)
    exact = Interaction(pool, target, geometry)
    torch.testing.assert_close(sketches.rows(pool, target, geometry), exact.rows_by_parameter)
    torch.testing.assert_close(sketches.gram(pool, [0, 1], geometry), exact.gram([0, 1]))
    assert sketches.squared_length(target, geometry) == pytest.approx(float((mask * target["a.0.weight"] ** 2).sum()))


def test_a_matrix_that_a_mask_leaves_nothing_of_has_no_share() -> None:
    pool, _ = outer_pool({"a.0.weight": (24, 32)}, (5, 7))
    target, geometry = {"a.0.weight": torch.ones(24, 32)}, {"a.0.weight": torch.zeros(24, 32)}.__getitem__
    sketches = Sketches(pool, project(target, geometry, seeded(2), width=4), geometry)
    assert not sketches.gram(pool, [0, 1], geometry).any()
    assert not any(rows.any() for rows in sketches.rows(pool, target, geometry).values())


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
