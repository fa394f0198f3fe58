"""A gradient in parts is the sum of them, for whoever asks, and costs no more than what is asked of it."""

import copy
from typing import Any

import pytest
import torch
from gradient_selectors.engine import SelectionEngine
from gradient_selectors.target import Target
from gradient_selectors.views.interaction import Interaction
from gradient_selectors.views.scoring import Exact, Scoring
from gradient_selectors.views.sketches import Sketched, low_ranks, project
from gradient_selectors.weigh.filter_then_weight import FilterThenWeight
from gradient_selectors.world.base import World
from gradient_selectors.world.partial import Partial, part_of, shape_of
from torch import Tensor

from tests.gradient_selectors.world.test_ranks_agree import EPS, LENGTHS, wide_model
from tests.gradient_selectors.world.threads import ThreadWorld, on_ranks, without_locks
from tests.helpers.oracle import make_batch

SHAPE, RANK = (200, 300), 16
CLOSE = 1e-5


def values(seed: int, shape: tuple[int, int] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low(matrices: dict[str, Tensor], **totals: Any) -> dict[str, Tensor]:
    starts = {n: torch.randn(max(SHAPE), RANK, generator=torch.Generator().manual_seed(9)) for n in matrices}
    return {n: found.left_pr @ found.right_dr.T for n, found in low_ranks(matrices, starts, **totals).items()}


@pytest.mark.parametrize("shape", [SHAPE, SHAPE[::-1]])
def test_its_low_rank_is_that_of_the_sum_and_nothing_large_is_exchanged(shape: tuple[int, int]) -> None:
    whole = {name: values(seed, shape) + values(seed + 1, shape) for name, seed in (("a", 0), ("b", 2))}

    def work(world: ThreadWorld) -> dict[str, Tensor]:
        gradient = Partial(world, {"a": values(world.rank, shape), "b": values(2 + world.rank, shape)})
        assert "a" in gradient
        assert shape_of(gradient, "a") == shape
        found = low({name: part_of(gradient, name) for name in gradient}, totals=gradient.totals)
        # Of each matrix twice two products, of which each rank sends its own.
        assert world.sent["sum"] == 2 * 4 * 2 * RANK * sum(shape)
        return found

    first, other = on_ranks(2, work)
    for name in whole:
        assert torch.equal(first[name], other[name])
    torch.testing.assert_close(first, low(whole), rtol=1e-3, atol=1e-3)


def test_it_moves_as_its_sum_does_whatever_was_asked_for_meanwhile() -> None:
    def work(world: ThreadWorld) -> tuple[Tensor, bool]:
        gradient = Partial(world, {"a": values(world.rank), "b": values(10 + world.rank)})
        kept = gradient["a"].clone()
        for seed in (20, 30):
            gradient.move(Partial(world, {"a": values(seed + world.rank), "b": values(seed + 2 + world.rank)}), 0.25)
            kept.lerp_(values(seed) + values(seed + 1), 0.25)
        assert torch.equal(dict(gradient)["a"], gradient["a"])
        torch.testing.assert_close(gradient["a"], kept)
        sent = world.sent["sum"]
        assert gradient["a"].equal(gradient["a"])
        assert world.sent["sum"] == sent  # once
        return gradient["b"], gradient.is_finite()

    first, other = on_ranks(2, work)
    assert torch.equal(first[0], other[0])
    assert first[1]
    assert other[1]


def test_all_know_of_a_part_that_is_not_finite() -> None:
    def work(world: ThreadWorld) -> bool:
        return Partial(world, {"a": values(0) / (0.0 if world.rank else 1.0)}).is_finite()

    assert on_ranks(2, work) == [False, False]


def test_a_square_is_summed_only_where_it_is_asked_for() -> None:
    whole = values(0) + values(1)

    def work(world: ThreadWorld) -> float:
        target, preconditioner = Partial(world, {"a": values(world.rank)}), {"a": values(5).abs()}.__getitem__
        scoring = Sketched(RANK)
        scoring.start(target, preconditioner, None)
        assert world.sent["sum"] < whole.nbytes
        return scoring.squared_length(target, preconditioner)

    exact = project({"a": whole}, {"a": values(5).abs()}.__getitem__, torch.Generator())["a"].square
    assert exact is not None
    for found in on_ranks(2, work):
        assert found == pytest.approx(float(exact), rel=CLOSE)


def engine_of(world: World, model: Any, scoring: Scoring) -> SelectionEngine:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=EPS)
    target = Target.of([make_batch((8, 10, 6, 9), seed=50)], refresh_steps=2, refresh_samples=2)
    return SelectionEngine(model, optimizer, FilterThenWeight(3), target=target, scoring=scoring, world=world)


def step(engine: SelectionEngine, number: int) -> Tensor:
    found = engine.backward(make_batch(LENGTHS[number % 2], seed=number)).coefficients_N
    engine.optimizer.step()
    engine.optimizer.zero_grad()
    return found


def test_a_sketched_refresh_exchanges_less_than_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(Interaction, monkeypatch)

    def sent(scoring: Scoring) -> tuple[int, int]:
        """Bytes of sums, of a step with a refresh and of one without."""
        models = [wide_model() for _ in range(2)]

        def work(world: ThreadWorld) -> tuple[int, int]:
            engine = engine_of(world, models[world.rank], scoring_of[world.rank])
            step(engine, 0)
            first = world.sent["sum"]
            step(engine, 1)
            return first, world.sent["sum"] - first

        scoring_of = [copy.deepcopy(scoring) for _ in range(2)]
        return on_ranks(2, work)[0]

    exact, sketched = sent(Exact()), sent(Sketched())
    assert exact[0] - exact[1] > 4 * sum(p.numel() for p in wide_model().parameters()) * 0.9
    assert sketched[0] - sketched[1] < 0.7 * (exact[0] - exact[1])  # these matrices are small: two vectors are much


def test_a_run_goes_on_from_its_state_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(Interaction, monkeypatch)
    models = [wide_model() for _ in range(4)]

    def work(world: ThreadWorld) -> list[Tensor]:
        engine = engine_of(world, models[world.rank], Sketched())
        for number in range(3):
            step(engine, number)
        state = copy.deepcopy(engine.state_dict())
        moments = copy.deepcopy(engine.optimizer.state_dict())
        again = engine_of(world, models[2 + world.rank], Sketched())
        models[2 + world.rank].load_state_dict(models[world.rank].state_dict())
        again.optimizer.load_state_dict(moments)
        again.load_state_dict(state)
        pairs = [(step(engine, number), step(again, number)) for number in range(3, 7)]
        assert all(torch.equal(one, two) for one, two in pairs)
        return [one for one, _ in pairs]

    first, other = on_ranks(2, work)
    assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))
