"""Invariants T1 to T22 of selection by gradients. Those not below are proven elsewhere:

| T | says | proven by |
|---|---|---|
| T3 | scores are inner products with autograd's gradients | test_capture: rows_gram_and_update_agree_with_autograd |
| T4 | several target samples: mean of gradients | test_capture: target_rows_are_averaged_as_gradients |
| T5 | LoRA with alpha / r, ties, a module used twice | test_capture: the models of its fixture, a_module_called_twice |
| T5 | the same under approximate products | test_rank_one: rank_one_is_exact_for_rank_one |
| T7 | second moments of rank one: the fit is exact | test_rank_one: rank_one_is_exact_for_rank_one |
| T9 | the linear map against AdamW itself | test_preconditioner: the_linearised_update_is_adamws_but_for_the_... |
| T12 | the optimum against brute force, KKT | test_coefficients: equals_brute_force, optimality_conditions |
| T13 | a target in the cone is met | test_coefficients: a_target_inside_the_cone_is_met_exactly |
| T14 | one candidate is a division | test_coefficients: one_candidate_is_a_division |
| T15 | nothing helps: w = 0, and what follows | test_coefficients, test_filter_then_weight, test_engine: nothing_... |
| T18 | order does not matter | test_filter_then_weight: order_of_the_pool_does_not_matter |
| T20 | no worse than the best single and equal weights | test_filter_then_weight: the_choice_is_as_good_as_... |
| T22 | book-keeping is autograd, equal weights are AdamW | test_capture: rows_gram_and_update..., test_engine |
| T22 | weight zero and the target leave no trace | test_capture: a_sample_of_weight_zero..., test_step |

Errors of 1e-12 in float64 (T1) do not apply: sums are float32 by design. T23 on belong to DualSFT.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from gradient_selectors.capture import gradients as written
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.factors import Outer, Segments
from gradient_selectors.capture.gradients import PoolGradients
from gradient_selectors.preconditioner import AdamPreconditioner, adam_preconditioner, plain
from gradient_selectors.views.interaction import Interaction
from gradient_selectors.views.rank_one import ghost_gram
from gradient_selectors.weigh.coefficients import CoefficientSolver
from gradient_selectors.weigh.filter_then_weight import FilterThenWeight, Metric, matching_pursuit, with_ridge
from gradient_selectors.weigh.program import Matrix, Vector
from torch import Size, Tensor

from tests.helpers.oracle import dense, make_batch, make_model, random_like, relative_error
from tests.helpers.pools import outer_factor, outer_pool, written_pool

EXACT = 1e-5
LENGTHS = (5, 9, 3, 7)
SOLVER = CoefficientSolver()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def method(metric: Metric = "p_norm") -> FilterThenWeight:
    return FilterThenWeight(batch_size=8, keep_ratio=1.0, solver=SOLVER, ridge=1e-6, metric=metric)


def random_rows(size: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(size, 6, generator=seeded(seed)) + 0.4


def interaction_of(rows: Tensor, preconditioner: Tensor | None = None) -> Interaction:
    interaction = written_pool(rows.tolist(), [1.0] * 6)
    return interaction if preconditioner is None else replace(interaction, preconditioner=lambda _: preconditioner)


def gram_of(factor: Outer) -> tuple[Tensor, Tensor]:
    """By token pairs and written out."""
    shape = Size([factor.left_Rp.shape[1], factor.right_Rd.shape[1]])
    n = factor.segments.num_samples
    return ghost_gram(factor), PoolGradients(torch.ones(n), {"w": [factor]}, {"w": shape}).gram(range(n), plain)


@pytest.mark.parametrize("chunk", [20, 10**6])
def test_t01_every_way_to_a_gram_matrix_is_the_same(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens in any order, padding without a gradient, in chunks or at once."""
    monkeypatch.setattr(written, "CHUNK_ELEMENTS", chunk)
    factor = outer_factor(LENGTHS, 6, 11, seed=0)
    reference = gram_of(factor)[0]
    spans = [torch.arange(factor.segments.offsets[i], factor.segments.offsets[i + 1]) for i in range(4)]
    shuffled = torch.cat([span[torch.randperm(len(span), generator=seeded(1))] for span in spans])
    padded_left = torch.cat([torch.cat([factor.left_Rp[span], torch.zeros(2, 6)]) for span in spans])
    padded_right = torch.cat([torch.cat([factor.right_Rd[span], torch.ones(2, 11)]) for span in spans])
    offsets = tuple(offset + 2 * i for i, offset in enumerate(factor.segments.offsets))
    for other in (
        factor,
        Outer(factor.left_Rp[shuffled], factor.right_Rd[shuffled], factor.segments),
        Outer(padded_left, padded_right, Segments(offsets)),
    ):
        for gram in gram_of(other):
            assert relative_error(gram, reference) < EXACT


@pytest.mark.parametrize("kind", ["llama", "qwen2_tied", "lora"])
def test_t02_gram_is_positive_and_sums_to_the_length_of_the_gradient(kind: str) -> None:
    model = make_model(kind)
    capture, batch = GradientCapture(model), make_batch((8, 6, 9, 7))
    preconditioner = random_like(capture, 5)
    gradients = capture.run(batch)
    gram = gradients.gram(range(4), preconditioner.__getitem__)
    torch.testing.assert_close(gram, gram.T)
    assert torch.linalg.eigvalsh(gram)[0] > -1e-6 * float(gram.trace())
    lengths = gram.diag().sqrt()
    assert (gram.abs() <= torch.outer(lengths, lengths) * (1 + 1e-6)).all()
    oracle = dense(model, batch)
    summed = oracle.gradients.sum(0)
    squared = float((summed**2 * oracle.flat(preconditioner)).sum())
    assert float(gram.sum()) == pytest.approx(squared, rel=1e-4)


def test_t06_a_flat_preconditioner_is_plain_and_its_scale_does_not_matter() -> None:
    rows, preconditioner = random_rows(), torch.rand(6, generator=seeded(1)) + 0.1
    torch.testing.assert_close(interaction_of(rows, torch.ones(6)).gram(range(8)), interaction_of(rows).gram(range(8)))
    one, scaled = interaction_of(rows, preconditioner), interaction_of(rows, 1e-4 * preconditioner)
    torch.testing.assert_close(scaled.gram(range(8)), 1e-4 * one.gram(range(8)))
    torch.testing.assert_close(scaled.utilities_N, 1e-4 * one.utilities_N)
    metrics: tuple[Metric, ...] = ("p_norm", "update", "greats")
    for metric in metrics:
        weights = method(metric).decide(one).coefficients_N
        torch.testing.assert_close(method(metric).decide(scaled).coefficients_N, weights, rtol=1e-3, atol=1e-5)


def frozen_update(gradient: Tensor, moment: Tensor, second: Tensor, weight: Tensor, decay: float) -> Tensor:
    """AdamW's update at step 51 with the second moment of step 50, from its definition, at rate 0.01."""
    mean = (0.9 * moment + 0.1 * gradient) / (1 - 0.9**51)
    return 0.01 * (mean / ((second / (1 - 0.99**50)).sqrt() + 1e-8) + decay * weight)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_t08_momentum_and_decay_cancel_from_the_difference_of_two_updates(decay: float) -> None:
    moment, weight, one, two = torch.randn(4, 6, 5, generator=seeded(), dtype=torch.float64)
    second = torch.rand(6, 5, generator=seeded(), dtype=torch.float64)
    preconditioner = adam_preconditioner(second, 50, 0.01, (0.9, 0.99), 1e-8).double()
    difference = frozen_update(one, moment, second, weight, decay) - frozen_update(two, moment, second, weight, decay)
    torch.testing.assert_close(difference, preconditioner * (one - two), rtol=1e-5, atol=1e-9)


def test_t10_the_scale_of_the_loss_does_not_matter() -> None:
    """All gradients, history included, times s: the same weights (eps = 0)."""
    weights = []
    for scale in (1.0, 1e3):
        parameter = torch.nn.Parameter(torch.zeros(6))
        optimizer = torch.optim.AdamW([parameter], eps=0.0)
        for step in range(20):
            parameter.grad = scale * torch.randn(6, generator=seeded(step))
            optimizer.step()
        interaction = interaction_of(scale * random_rows())
        preconditioner = AdamPreconditioner.of(optimizer, {"w": parameter})
        target = {"w": scale * interaction.target["w"]}
        weights.append(
            method().decide(replace(interaction, preconditioner=preconditioner, target=target)).coefficients_N
        )
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-5)


def test_t11_products_with_the_gram_matrix_need_no_gram_matrix() -> None:
    shapes = {"a.0.weight": (6, 9), "a.1.weight": (9, 5)}
    pool, _ = outer_pool(shapes, LENGTHS)
    preconditioner = {name: torch.rand(shape, generator=seeded(3)) + 0.1 for name, shape in shapes.items()}
    gram = pool.gram(range(4), preconditioner.__getitem__)
    weights = torch.tensor([0.3, 0.0, 1.2, 0.5])
    update = pool.weighted_gradient(weights)
    products = pool.dots({name: preconditioner[name] * update[name] for name in shapes})
    assert relative_error(torch.stack(list(products.values())).sum(0), gram @ weights.double()) < EXACT
    squared = pool.squared_length(weights, preconditioner.__getitem__)
    assert squared == pytest.approx(float(weights.double() @ gram @ weights.double()), rel=EXACT)


def program(seed: int, size: int = 8) -> tuple[Matrix, Vector]:
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(size, 12)) + 0.3
    return with_ridge(gradients @ gradients.T, 1e-3), gradients @ rng.normal(loc=0.3, size=12)


def utility(gram: Matrix, linear: Vector, weights: Vector) -> float:
    return float(linear @ weights - 0.5 * weights @ gram @ weights)


@pytest.mark.parametrize("seed", range(5))
def test_t12_the_utility_of_the_optimum_is_half_its_linear_term(seed: int) -> None:
    gram, linear = program(seed)
    weights = SOLVER.solve(gram, linear).coefficients
    assert utility(gram, linear, weights) == pytest.approx(0.5 * linear @ weights, rel=1e-8)


def test_t16_a_copy_adds_no_utility_and_shares_the_coefficient() -> None:
    gradients = np.random.default_rng(0).normal(size=(5, 12)) + 0.3
    target = gradients.sum(0)
    twice = np.vstack([gradients, gradients[:1]])
    results = []
    for rows in (gradients, twice):
        gram, linear = rows @ rows.T, rows @ target
        weights = SOLVER.solve(gram, linear, ridge=1e-7).coefficients
        results.append((utility(gram, linear, weights), weights))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert results[1][1][0] == pytest.approx(results[1][1][5], rel=1e-4)


def test_t17_a_longer_target_lengthens_the_update_and_turns_it_nowhere() -> None:
    gram, linear = program(1)
    np.testing.assert_allclose(
        SOLVER.solve(gram, 7 * linear).coefficients, 7 * SOLVER.solve(gram, linear).coefficients, rtol=1e-6
    )
    interaction = interaction_of(random_rows())
    longer = replace(interaction, target={"w": 7 * interaction.target["w"]})
    once, again = method().decide(interaction).coefficients_N, method().decide(longer).coefficients_N
    torch.testing.assert_close(once, again, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_t19_utility_grows_with_the_number_of_samples(seed: int) -> None:
    """Under the matching pursuit, whose longer choices start with the shorter ones."""
    gram, linear = program(seed)
    utilities, earlier = [0.0], list[int]()
    for size in range(1, 9):
        picked = matching_pursuit(gram, linear, size, SOLVER)
        assert picked[: len(earlier)] == earlier
        earlier = picked
        weights = np.zeros(8)
        weights[picked] = SOLVER.solve(gram[np.ix_(picked, picked)], linear[picked]).coefficients
        utilities.append(utility(gram, linear, weights))
    assert all(after >= before - 1e-12 for before, after in itertools.pairwise(utilities))
    assert utilities[-1] > utilities[0]


def test_t21_what_is_predicted_is_what_happens() -> None:
    """The fall of the target's loss over random weights: first order, with an error that shrinks with the step."""
    model = make_model("llama")
    capture, target_batch = GradientCapture(model), make_batch((8, 9), seed=4)
    target = capture.run(target_batch).weighted_gradient(torch.tensor([0.5, 0.5]))
    gradients = capture.run(make_batch((8, 6, 9, 7)))
    utilities_N = Interaction(gradients, target, plain).utilities_N
    before = float(capture.losses(target_batch).double().mean())
    start = {name: parameter.detach().clone() for name, parameter in capture.parameters.items()}

    def fall(weights: Tensor, rate: float) -> float:
        update = gradients.weighted_gradient(weights)
        with torch.no_grad():
            for name, parameter in capture.parameters.items():
                parameter.copy_(start[name] - rate * update[name])
        return before - float(capture.losses(target_batch).double().mean())

    draws = torch.rand(12, 4, generator=seeded())
    predicted = torch.stack([utilities_N @ weights for weights in draws])
    happened = torch.tensor([fall(weights, 1e-2) for weights in draws]) / 1e-2
    ranks = torch.stack([values.argsort().argsort().float() for values in (predicted, happened)])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.9
    errors = [abs(fall(draws[0], rate) / rate - float(predicted[0])) for rate in (0.03, 0.003)]
    assert errors[1] < 0.5 * errors[0]
