"""Sketches: exact utilities where the target has the rank, heads by way of the pass, redundancy right in the mean."""

import copy
from collections.abc import Callable

import pytest
import torch
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.factors import LowRank
from gradient_selectors.preconditioner import Preconditioner, plain
from gradient_selectors.views.interaction import Interaction
from gradient_selectors.views.scoring import Exact
from gradient_selectors.views.sketches import Sketched, from_tensors, low_ranks, project, to_tensors
from torch import Tensor

from tests.helpers.oracle import dense, make_batch, make_model, random_like, relative_error
from tests.helpers.pools import outer_pool

LENGTHS = (8, 6, 7)
EXACT = 1e-5  # relative, float32


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sketched(
    capture: GradientCapture, preconditioner: Preconditioner, target: dict[str, Tensor], seed: int
) -> Interaction:
    scoring = Sketched(8, seeded(seed))
    gradients = capture.run(make_batch(LENGTHS), scoring.start(target, preconditioner, capture.head))
    return Interaction(gradients, target, preconditioner, scoring)


def started(
    target: dict[str, Tensor], preconditioner: Preconditioner, width: int, seed: int = 2, head: str | None = None
) -> Sketched:
    """Ready for a pool."""
    scoring = Sketched(width, seeded(seed))
    scoring.start(target, preconditioner, head)
    return scoring


def drawn_rows(scoring: Sketched, name: str) -> Tensor:
    assert scoring.projections is not None
    return scoring.projections[name].sample.rows_n


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
    exact_N = oracle.gradients @ (oracle.flat(preconditioner) * oracle.flat(target))
    found = sketched(capture, preconditioner.__getitem__, target, 0)
    assert relative_error(found.utilities_N, exact_N) < 1e-3
    assert found.utilities_by_parameter.keys() == set(capture.parameters)


@pytest.mark.parametrize("kind", ["llama", "qwen2_tied"])
def test_the_head_is_the_same_whether_the_pass_knew_its_direction(kind: str) -> None:
    capture = GradientCapture(make_model(kind))
    target = random_like(capture, 6)
    assert capture.head is not None
    scoring, other = (started(target, plain, 8, seed, capture.head) for seed in (0, 1))
    direction = scoring.start(target, plain, capture.head)
    assert direction is not None
    during, after = (capture.run(make_batch(LENGTHS), known) for known in (direction, None))
    for seen_from in (scoring, other):  # the pass knew the direction of the first
        one, two = (torch.stack([*seen_from.utilities(g, target, plain).values()]) for g in (during, after))
        assert relative_error(one, two) < EXACT


def low_rank(matrix: Tensor, rank: int) -> LowRank:
    return low_ranks({"a": matrix}, {"a": torch.randn(max(matrix.shape), rank, generator=seeded(1))})["a"]


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_the_direction_is_almost_the_best_of_its_rank(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=seeded(0)) @ torch.diag(0.9 ** torch.arange(shape[1]).float())
    found = low_rank(matrix, 10)
    best = float(torch.linalg.svdvals(matrix)[10:].norm())
    assert float((found.left_pr @ found.right_dr.T - matrix).norm()) < 1.25 * best


def test_directions_of_very_different_sizes_are_all_found() -> None:
    """Rounding must not hide the small ones: where the sum over ranks rounds otherwise, they would be others."""
    sides = [torch.linalg.qr(torch.randn(n, 12, generator=seeded(n), dtype=torch.float64)).Q for n in (80, 48)]
    sizes = torch.logspace(0, -4, 12, dtype=torch.float64)
    basis = low_rank((sides[0] * sizes @ sides[1].T).float(), 12).right_dr.double()
    missed = sides[1] - basis @ (basis.T @ sides[1])
    assert float(missed.norm(dim=0).max()) < 1e-3


def masked(capture: GradientCapture, density: float) -> dict[str, Tensor]:
    generator = seeded(3)
    return {
        n: v.abs() * (torch.rand(v.shape, generator=generator) < density) for n, v in random_like(capture, 5).items()
    }


@pytest.mark.parametrize("density", [1.0, 0.2])
def test_the_state_comes_back_from_a_checkpoint(density: float) -> None:
    """What was projected bit for bit, and the generator that the next projection is drawn with."""
    capture = GradientCapture(make_model("qwen2_tied"))
    target, preconditioner = random_like(capture, 6), masked(capture, density).__getitem__
    before, after = started(target, preconditioner, 8, 0, capture.head), Sketched(8, seeded(9))
    assert before.projections is not None
    assert any(projection.direction is None for projection in before.projections.values()) == (density < 1)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    gradients = capture.run(make_batch(LENGTHS))
    for _ in range(2):
        directions = [scoring.start(target, preconditioner, capture.head) for scoring in (before, after)]
        assert (directions[0] is None) == (directions[1] is None) == (density < 1)
        one, two = (scoring.utilities(gradients, target, preconditioner) for scoring in (before, after))
        assert all(torch.equal(two[name], utilities_N) for name, utilities_N in one.items())
        grams = [scoring.gram(gradients, [0, 2], preconditioner) for scoring in (before, after)]
        assert torch.equal(*grams)
        squares = {scoring.squared_length(target, preconditioner) for scoring in (before, after)}
        assert len(squares) == 1
        before.reset()
        after.reset()


def test_a_state_that_was_reset_is_projected_anew() -> None:
    target = {"a.0.weight": torch.randn(640, 20, generator=seeded(1))}
    scoring = started(target, plain, 4)
    first = drawn_rows(scoring, "a.0.weight")
    scoring.start(target, plain, None)
    assert torch.equal(drawn_rows(scoring, "a.0.weight"), first)
    scoring.reset()
    assert sorted(scoring.state_dict()) == ["generator"]
    scoring.start(target, plain, None)
    assert not torch.equal(drawn_rows(scoring, "a.0.weight"), first)


def test_projections_come_back_from_flat_tensors() -> None:
    target = {"a.0.weight": torch.randn(40, 32, generator=seeded(1)), "b.norm": torch.ones(3)}
    mask = {"a.0.weight": torch.eye(40, 32), "b.norm": torch.ones(3)}
    for preconditioner in (plain, mask.__getitem__):
        flat = to_tensors(project(target, preconditioner, seeded(0), width=4))
        again = to_tensors(from_tensors(flat))
        assert {name: values.tolist() for name, values in again.items()} == {n: v.tolist() for n, v in flat.items()}


def test_what_an_earlier_version_wrote_is_made_anew() -> None:
    assert from_tensors({"target_pr.w": torch.ones(2, 1), "square.w": torch.ones(()), "left_pk.w": torch.ones(2)}) == {}


@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama", "gpt2")), "qwen2_tied", "gemma2_capped"]
)
@pytest.mark.parametrize("density", [pytest.param(1.0, marks=pytest.mark.slow), 0.2])
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
    exact = oracle.gram(preconditioner)[1:, 1:]
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
    assert torch.equal(found.utilities_N, Interaction(found.gradients, target, plain).utilities_N)


@pytest.mark.parametrize("lengths", [(6, 6, 6), (4, 9, 5)])
def test_what_was_drawn_stands_for_all_rows(lengths: tuple[int, ...]) -> None:
    pool, rows = outer_pool({"a.0.weight": (40, 32)}, lengths)
    target = {"a.0.weight": torch.randn(40, 32, generator=seeded(1))}
    scoring = started(target, plain, 16)
    drawn = drawn_rows(scoring, "a.0.weight")
    assert len(drawn) == 16
    written = rows["a.0.weight"][[0, 2]][:, drawn].flatten(1).double()
    assert relative_error(scoring.gram(pool, [0, 2], plain), written @ written.T * 40 / 16) < EXACT


def test_one_row_in_32_is_drawn_of_a_large_matrix() -> None:
    target = {"a.0.weight": torch.randn(640, 20, generator=seeded(1))}
    drawn = drawn_rows(started(target, plain, 4), "a.0.weight").tolist()
    assert len(drawn) == 20
    assert drawn == sorted(set(drawn))


def test_under_a_mask_utilities_are_exact_and_only_rows_that_may_move_are_drawn() -> None:
    pool, _ = outer_pool({"a.0.weight": (24, 32)}, (5, 7))
    target = {"a.0.weight": torch.randn(24, 32, generator=seeded(1))}
    mask = torch.zeros(24, 32)
    mask[[3, 7, 20]] = 1.0
    preconditioner = {"a.0.weight": mask}.__getitem__
    scoring = started(target, preconditioner, 4)
    assert set(drawn_rows(scoring, "a.0.weight").tolist()) == {3, 7, 20}
    found, exact = (Interaction(pool, target, preconditioner, seen) for seen in (scoring, Exact()))
    assert torch.equal(found.utilities_N, exact.utilities_N)
    assert relative_error(found.gram([0, 1]), exact.gram([0, 1])) < EXACT
    want = float((mask * target["a.0.weight"] ** 2).double().sum())
    assert scoring.squared_length(target, preconditioner) == pytest.approx(want, rel=EXACT)


def test_a_matrix_that_a_mask_leaves_nothing_of_has_no_share() -> None:
    pool, _ = outer_pool({"a.0.weight": (24, 32)}, (5, 7))
    target, preconditioner = {"a.0.weight": torch.ones(24, 32)}, {"a.0.weight": torch.zeros(24, 32)}.__getitem__
    scoring = started(target, preconditioner, 4)
    assert not scoring.gram(pool, [0, 1], preconditioner).any()
    assert not any(rows.any() for rows in scoring.utilities(pool, target, preconditioner).values())


def test_adapters_and_vectors_are_exact() -> None:
    capture = GradientCapture(make_model("lora"))
    target, preconditioner = random_like(capture, 6), random_like(capture, 5)
    found = sketched(capture, preconditioner.__getitem__, target, 0)
    exact = Interaction(found.gradients, target, preconditioner.__getitem__)
    assert torch.equal(found.utilities_N, exact.utilities_N)
    assert torch.equal(found.gram(range(3)), exact.gram(range(3)))


def test_sketches_of_one_preconditioner_are_not_taken_for_another() -> None:
    pool, _ = outer_pool({"a.0.weight": (24, 32)}, (5, 7))
    target = {"a.0.weight": torch.ones(24, 32)}
    scoring, other = started(target, plain, 4), target.__getitem__
    interaction = Interaction(pool, target, other, scoring)
    asks: tuple[Callable[[], object], ...] = (
        lambda: interaction.utilities_N,
        lambda: interaction.gram([0, 1]),
        lambda: interaction.relative_utilities_N,
    )
    for ask in asks:
        with pytest.raises(ValueError, match="made for one preconditioner"):
            ask()
    with pytest.raises(ValueError, match="made for one preconditioner"):
        Sketched(4).gram(pool, [0, 1], plain)  # not even started
