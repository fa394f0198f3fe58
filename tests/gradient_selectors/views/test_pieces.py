"""Pools scored in pieces against the whole pool at once, and against autograd one sample at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from gradient_selectors.capture import kinds
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.gradients import PoolGradients, layer_of
from gradient_selectors.engine import SelectionEngine
from gradient_selectors.preconditioner import Preconditioner, plain
from gradient_selectors.route.gast import Gast
from gradient_selectors.views import pieces
from gradient_selectors.views.again import PoolInPieces
from gradient_selectors.views.interaction import Interaction
from gradient_selectors.views.pieces import Budget, score_pool
from gradient_selectors.views.rank_one import RankOne
from gradient_selectors.views.scoring import Exact, Scoring
from gradient_selectors.views.sketches import Sketched
from gradient_selectors.weigh.filter_then_weight import FilterThenWeight
from gradient_selectors.weigh.greedy import Greedy
from gradient_selectors.weigh.selector import Decision
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from tests.helpers.oracle import dense, make_batch, make_model, random_like, relative_error

SAME = 1e-5  # relative, float32
LENGTHS = (9, 7, 12, 8, 6, 10)
NOTHING_KEPT, ALL_KEPT = 0, None
KINDS = ("gpt2", "qwen2_tied", "lora", "checkpointing", "gemma2_capped")
METHODS: Mapping[str, Any] = {
    "greedy": lambda: (Greedy(2), Exact(), None),
    "exact": lambda: (FilterThenWeight(3), Exact(), None),
    "update": lambda: (FilterThenWeight(3, metric="update"), Exact(), None),
    "natural": lambda: (FilterThenWeight(3, normalisation="natural"), Exact(), None),
    "sketched": lambda: (FilterThenWeight(3), Sketched(4), None),
    "gast": lambda: (FilterThenWeight(4), Sketched(4), Gast(1)),
}


def some_kept(kind: str) -> int:
    """Bytes that the factors of some samples fit, and those of others do not."""
    return 12_000 if kind.startswith("lora") else 60_000


@pytest.fixture(autouse=True)
def _no_matrix_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrices of tiny models would all be written out, and nothing would be let go."""
    monkeypatch.setattr(kinds, "NARROW", 0)
    monkeypatch.setattr(pieces, "NARROW", 0)


@dataclass(frozen=True)
class Given:
    """Coefficients that are given, (N,), or (L, N) with a row for each layer."""

    coefficients: Tensor
    needs_target: ClassVar[bool] = False

    def decide(self, interaction: Interaction) -> Decision:
        if self.coefficients.ndim == 1:
            return Decision(self.coefficients)
        return Decision(torch.ones(interaction.num_samples), coefficients_LN=self.coefficients)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradient(model: nn.Module) -> Tensor:
    left = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained(model).values()]
    return torch.cat([values.flatten() for values in left])


def warm_adamw(model: nn.Module) -> torch.optim.AdamW:
    """With a second moment that is spread over magnitudes."""
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    generator = torch.Generator().manual_seed(5)
    for p in trained(model).values():
        spread = torch.exp(torch.randn(p.shape, generator=generator)) * 1e-4
        optimizer.state[p] = {"step": torch.tensor(9.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": spread}
    return optimizer


def backward(
    model: nn.Module, method: str, micro_tokens: int | None, factors_bytes: int | None
) -> tuple[Decision, Any, Tensor]:
    """What one call of the engine decides, reports and leaves."""
    selector, scoring, route = METHODS[method]()
    with SelectionEngine(
        model,
        warm_adamw(model),
        selector,
        target=[make_batch((6, 9, 7), seed=4)],
        scoring=scoring,
        route=route,
        reports_utilities=True,
        micro_tokens=micro_tokens,
        factors_bytes=factors_bytes,
    ) as engine:
        decision = engine.backward(make_batch(LENGTHS))
        return decision, engine.last, gradient(model)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *(("llama", method) for method in METHODS),
        *((kind, "gast") for kind in KINDS),
        *(pytest.param(kind, "greedy", marks=pytest.mark.slow) for kind in KINDS),
    ],
)
def test_decisions_and_updates_are_those_of_the_whole_pool(kind: str, method: str) -> None:
    model = make_model(kind)
    decision, report, left = backward(model, method, None, None)
    assert (report.pieces, report.second_pass_samples) == (1, 0)
    assert decision.selected
    for factors_bytes in (NOTHING_KEPT, some_kept(kind), ALL_KEPT):
        found, told, again = backward(model, method, 18, factors_bytes)
        assert told.pieces == 4
        assert relative_error(told.losses_N, report.losses_N) < SAME
        assert relative_error(told.utilities_N, report.utilities_N) < SAME
        torch.testing.assert_close(found.coefficients_N, decision.coefficients_N, rtol=1e-4, atol=SAME)
        assert (found.coefficients_LN is None) == (decision.coefficients_LN is None)
        assert found.selected == decision.selected
        assert relative_error(again, left) < 1e-4
        if factors_bytes is ALL_KEPT:
            assert told.second_pass_samples == 0


@pytest.mark.parametrize("keeps_some", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2_tied", "lora", "lora_checkpointing", "gemma2_capped"])
def test_the_update_is_autograds(kind: str, keeps_some: bool) -> None:
    model, batch, coefficients_N = make_model(kind), make_batch(LENGTHS), torch.tensor([0.4, 0.0, 0.1, 0.3, 0.0, 0.2])
    oracle = dense(model, batch)
    optimizer = torch.optim.AdamW(trained(model).values())
    with SelectionEngine(
        model, optimizer, Given(coefficients_N), micro_tokens=18, factors_bytes=some_kept(kind) if keeps_some else 0
    ) as engine:
        engine.backward(batch)
        assert engine.last is not None
        assert 0 < engine.last.second_pass_samples <= 4
        assert set(engine.last.seconds) == {"target", "score", "weigh", "update", "second_pass"}
        assert all(seconds >= 0 for seconds in engine.last.seconds.values())
    assert relative_error(gradient(model), oracle.update(coefficients_N)) < SAME


def test_layers_may_have_coefficients_of_their_own() -> None:
    model, batch = make_model("llama"), make_batch(LENGTHS)
    oracle = dense(model, batch)
    optimizer = torch.optim.AdamW(trained(model).values())
    layers = len(GradientCapture(model).run(batch).layers)
    by_layer_LN = torch.rand(layers, len(batch), generator=torch.Generator().manual_seed(0))
    by_layer_LN[:, 1] = 0.0
    by_layer_LN[0] = 0.0
    with SelectionEngine(model, optimizer, Given(by_layer_LN), micro_tokens=18, factors_bytes=0) as engine:
        engine.backward(batch)
        names = engine.capture.run(batch).layers
    start, rows = 0, oracle.gradients
    for name, p in trained(model).items():
        part = slice(start, start := start + p.numel())
        want = by_layer_LN[names.index(layer_of(name))].double() @ rows[:, part]
        assert p.grad is not None
        if want.any():
            assert relative_error(p.grad.flatten(), want) < SAME, name
        else:
            assert not p.grad.any()


def scored(
    capture: GradientCapture,
    scoring: Scoring,
    target: Mapping[str, Tensor],
    preconditioner: Preconditioner,
    bytes_: int,
) -> PoolGradients:
    return score_pool(capture, make_batch(LENGTHS), scoring, target, preconditioner, Budget(18, bytes_))


@pytest.mark.parametrize("keeps_some", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2_tied", "lora"])
def test_views_are_those_of_gradients_written_out(kind: str, keeps_some: bool) -> None:
    """Under P, and under another P and another target than the pool was scored for."""
    model, batch = make_model(kind), make_batch(LENGTHS)
    oracle, capture = dense(model, batch), GradientCapture(model)
    target, other = random_like(capture, 1), random_like(capture, 2)
    first, second = random_like(capture, 3), random_like(capture, 4)
    pool = scored(capture, Exact(), target, first.__getitem__, some_kept(kind) if keeps_some else 0)
    assert isinstance(pool, PoolInPieces)
    for towards, diagonal in ((target, first), (target, second), (other, first)):
        preconditioner = first.__getitem__ if diagonal is first else second.__getitem__
        seen = Interaction(pool, towards, preconditioner)
        direction = oracle.flat({name: diagonal[name] * towards[name] for name in towards})
        assert relative_error(seen.utilities_N, oracle.gradients @ direction) < SAME
        assert relative_error(seen.gram([4, 1, 3]), oracle.gram(diagonal)[[4, 1, 3]][:, [4, 1, 3]]) < SAME
    dots = torch.stack(list(pool.dots(other).values())).sum(0)
    assert relative_error(dots, oracle.gradients @ oracle.flat(other)) < SAME
    weights_N = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.1, 0.2])
    for _ in range(2):  # what is asked twice is answered twice
        assert relative_error(oracle.flat(pool.weighted_gradient(weights_N)), oracle.update(weights_N)) < SAME
    length = float(weights_N.double() @ oracle.gram(first) @ weights_N.double())
    assert pool.squared_length(weights_N, first.__getitem__) == pytest.approx(length, rel=SAME)


def test_coefficients_that_are_changed_in_place_are_other_coefficients() -> None:
    model = make_model("llama")
    pool = scored(GradientCapture(model), Exact(), {}, plain, 0)
    weights_N = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.1, 0.2])
    name = next(iter(pool.factors))
    once = pool.weighted_gradient_of(name, weights_N)
    weights_N *= 2
    assert relative_error(pool.weighted_gradient_of(name, weights_N), 2 * once) < SAME


def test_what_is_let_go_leaves_numbers_and_rows_only() -> None:
    model = make_model("llama")
    capture = GradientCapture(model)
    target = random_like(capture, 1)
    pool = scored(capture, Sketched(4), target, plain, 0)
    assert isinstance(pool, PoolInPieces)
    assert pool.let_go == capture.matrices
    assert pool.reduced == set(range(len(LENGTHS)))
    for name in pool.let_go:
        (joined,) = pool.factors[name]
        rows = {part.written_Nnd.shape[1] for part in joined.parts}  # type: ignore[attr-defined]
        assert rows == {max(4, pool.shapes[name][0] // 32)}


def test_a_budget_for_some_is_used_and_not_exceeded() -> None:
    model = make_model("llama")
    capture = GradientCapture(model)
    pool = scored(capture, Exact(), random_like(capture, 1), plain, some_kept("llama"))
    assert isinstance(pool, PoolInPieces)
    assert 0 < len(pool.reduced) < len(LENGTHS)


def test_an_exact_gram_is_computed_for_as_many_parameters_at_once_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = GradientCapture(make_model("llama"))
    target = random_like(capture, 1)
    runs, counts = [], []
    run = GradientCapture.run

    def counted(*args: Any, **options: Any) -> PoolGradients:
        runs.append(1)
        return run(*args, **options)

    monkeypatch.setattr(GradientCapture, "run", counted)
    for budget in (0, 5_000):
        pool = scored(capture, Exact(), target, plain, budget)
        before = len(runs)
        pool.gram([0, 1, 2], plain)
        counts.append(len(runs) - before)
    assert counts[0] > counts[1] > 0


def test_a_sample_that_is_not_finite_spoils_nothing() -> None:
    model, batch = make_model("llama"), make_batch(LENGTHS)
    rare = min(set(range(3, 300)) - set(batch.input_ids_NT.flatten().tolist()))
    batch.input_ids_NT[2, 1] = rare
    with SelectionEngine(
        model,
        warm_adamw(model),
        FilterThenWeight(3),
        target=[make_batch((6, 9, 7), seed=4)],
        micro_tokens=24,
        factors_bytes=0,
    ) as engine:
        with torch.no_grad():
            model.get_input_embeddings().weight[rare] = torch.nan
        decision = engine.backward(batch)
    assert decision.selected
    assert 2 not in decision.selected
    assert bool(gradient(model).isfinite().all())


def test_a_dropout_that_is_on_draws_anew_as_plain_training_does() -> None:
    shape = {"vocab_size": 300, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.0)).train()
    batch, weights_N = make_batch(LENGTHS), torch.tensor([0.0, 0.5, 0.2, 0.0, 0.1, 0.2])
    chosen = weights_N.nonzero().squeeze(1).tolist()
    capture = GradientCapture(model)
    pool = score_pool(capture, batch, Exact(), {}, plain, Budget(None, 0))
    torch.manual_seed(7)
    found = pool.weighted_gradient(weights_N)
    torch.manual_seed(7)
    capture.train(batch.among(chosen), weights_N[chosen])
    assert relative_error(torch.cat([found[name].flatten() for name in trained(model)]), gradient(model)) < SAME


def test_rank_one_needs_the_whole_pool() -> None:
    model = make_model("llama")
    optimizer = torch.optim.AdamW(trained(model).values())
    with pytest.raises(ValueError, match="RankOne needs all factors"):
        SelectionEngine(model, optimizer, Given(torch.ones(6)), scoring=RankOne(), micro_tokens=64)


def test_padding_falls_with_pieces() -> None:
    model = make_model("llama")
    padding = [backward(model, "sketched", micro_tokens, None)[1].padding for micro_tokens in (None, 20, 1)]
    assert padding[0] == pytest.approx(1 - sum(LENGTHS) / (6 * 12))
    assert padding[0] > padding[1] > 0
    assert padding[2] == 0
