"""Per-layer draws: the tests G1 to G12 of the method's analysis, and how they compose with coefficients.

Left out: G11 (memory and time) is a matter of benchmarks; the controls of G12 are tested here, its experiments are not.
That one layer's draw moves one layer's gradient only (G3) is in `test_interaction.py`.
"""

import math

import pytest
import torch
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.factors import Outer
from gradient_selectors.preconditioner import plain
from gradient_selectors.route.gast import Gast, Rule, draw, spread, standardised
from gradient_selectors.views.interaction import Interaction
from gradient_selectors.weigh.baselines import Equal, TopK
from gradient_selectors.weigh.selector import Decision
from torch import Tensor

from stream_trainer.models.loading import load_model
from tests.helpers.oracle import MODELS, dense, make_batch, make_model, random_like, relative_error
from tests.helpers.pools import block_pool

LENGTHS = (8, 6, 9, 7, 5, 8)
EXACT = 1e-5  # relative, float32
ALL = torch.ones(16, dtype=torch.bool)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_rows(layers: int = 4, samples: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(layers, samples, generator=seeded(seed))


def draws(rows_LN: Tensor, times: int, per_layer: int = 8, rule: Rule = "stochastic") -> Tensor:
    """(times, L, N) bool."""
    generator, scores = seeded(7), standardised(rows_LN)
    return torch.stack([draw(scores, ALL, per_layer, rule, generator) for _ in range(times)])


def routed(interaction: Interaction, per_layer: int, rule: Rule = "stochastic", seed: int = 0) -> Decision:
    return Gast(per_layer, seeded(seed), rule).route(Equal().decide(interaction), interaction)


@pytest.mark.parametrize("kind", ["llama", "qwen2_tied", "lora"])
def test_g1_the_whole_pool_is_plain_training(kind: str) -> None:
    capture = GradientCapture(make_model(kind))
    gradients = capture.run(make_batch(LENGTHS))
    decision = routed(Interaction(gradients, random_like(capture, 6), plain), len(LENGTHS))
    assert decision.coefficients_LN is not None
    update, plainly = (gradients.weighted_gradient(w) for w in (decision.coefficients_LN, decision.coefficients_N))
    for name, values in plainly.items():
        torch.testing.assert_close(update[name], values, rtol=EXACT, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama", "checkpointing"])
def test_g2_activation_gradients_are_bit_equal_under_any_route(kind: str) -> None:
    capture, batch = GradientCapture(make_model(kind)), make_batch(LENGTHS)
    target = random_like(capture, 6)

    def output_gradients(per_layer: int, rule: Rule) -> list[Tensor]:
        gradients = capture.run(batch)
        decision = routed(Interaction(gradients, target, plain), per_layer, rule)
        assert decision.coefficients_LN is not None
        gradients.weighted_gradient(decision.coefficients_LN)
        return [f.left_Rp for factors in gradients.factors.values() for f in factors if isinstance(f, Outer)]

    for one, other in zip(output_gradients(1, "top_k_per_layer"), output_gradients(6, "stochastic"), strict=True):
        assert torch.equal(one, other)


def test_g1_and_g3_each_layer_gets_the_mean_of_what_it_drew() -> None:
    model = make_model("llama")
    capture, batch = GradientCapture(model), make_batch(LENGTHS)
    gradients, oracle = capture.run(batch), dense(model, batch)
    decision = routed(Interaction(gradients, random_like(capture, 6), plain), 2)
    assert decision.coefficients_LN is not None
    start = 0
    for name, parameter in oracle.parameters.items():
        rows = oracle.gradients[:, start : start + parameter.numel()]
        start += parameter.numel()
        layer = next(i for i, layer in enumerate(gradients.layers) if name.startswith(f"{layer}."))
        drawn = decision.coefficients_LN[layer] > 0
        assert int(drawn.sum()) == 2
        got = gradients.weighted_gradient_of(name, decision.coefficients_LN)
        assert relative_error(got.flatten(), rows[drawn].mean(0)) < EXACT


@pytest.mark.parametrize("kind", ["llama", "qwen2_tied", "lora"])
def test_g4_scores_are_inner_products_of_the_layers_own_gradients(kind: str) -> None:
    model = make_model(kind)
    capture, batch, target_batch = GradientCapture(model), make_batch(LENGTHS), make_batch((6, 9), seed=4)
    target = capture.run(target_batch).weighted_gradient(torch.tensor([0.5, 0.5]))
    interaction = Interaction(capture.run(batch), target, plain)
    oracle, mean = dense(model, batch), dense(model, target_batch).gradients.mean(0)
    owners = [name for name, p in oracle.parameters.items() for _ in range(p.numel())]
    for row, layer in enumerate(interaction.gradients.layers):
        columns = [owner.startswith(f"{layer}.") for owner in owners]
        own, of_target = oracle.gradients[:, columns], mean[columns]
        # Products cancel, by how much depends on the processor's kernels: measured in what they could be at most.
        error = (interaction.utilities_LN[row].double() - own @ of_target).norm()
        assert float(error / (own.norm(dim=1) * of_target.norm()).norm()) < EXACT


def test_g5_layers_add_up_to_the_whole_and_predict_the_fall_of_the_targets_loss() -> None:
    model = make_model("llama")
    capture, batch, target_batch = GradientCapture(model), make_batch(LENGTHS), make_batch((6, 9), seed=4)
    halves = torch.tensor([0.5, 0.5])
    target = capture.run(target_batch).weighted_gradient(halves)
    gradients = capture.run(batch)
    interaction = Interaction(gradients, target, plain)
    assert relative_error(interaction.utilities_LN.sum(0), interaction.utilities_N) < EXACT
    weights_LN = routed(interaction, 2).coefficients_LN
    assert weights_LN is not None
    predicted = float((weights_LN * interaction.utilities_LN).sum())
    update, rate = gradients.weighted_gradient(weights_LN), 1e-3
    losses = []
    for sign in (-1, 1):  # central difference
        with torch.no_grad():
            for name, parameter in capture.parameters.items():
                parameter.sub_(sign * rate * update[name])
        losses.append(float(dense(model, target_batch).losses.mean()))
        with torch.no_grad():
            for name, parameter in capture.parameters.items():
                parameter.add_(sign * rate * update[name])
    assert (losses[0] - losses[1]) / (2 * rate) == pytest.approx(predicted, rel=0.02)


def test_g6_scores_do_not_depend_on_scale_and_offset() -> None:
    rows = random_rows()
    torch.testing.assert_close(standardised(3 * rows - 5), standardised(rows), rtol=0, atol=EXACT)
    torch.testing.assert_close(standardised(-rows), -standardised(rows))
    assert standardised(torch.full((2, 7), 0.1)).tolist() == [[0.0] * 7] * 2


def test_g6_no_sample_is_certain() -> None:
    rows = torch.zeros(1, 16)
    rows[0, 3] = 1e6
    scores = standardised(rows)
    assert float(scores.max()) == pytest.approx(math.sqrt(15))
    assert float(scores.softmax(1).max()) == pytest.approx(0.806, abs=1e-3)


def test_g7_k_distinct_samples_as_often_as_the_softmax_says() -> None:
    """With K = 1 the frequencies are the softmax; with K = 2 those of drawing one after the other."""
    rows = random_rows(layers=1, samples=16)
    chances = standardised(rows).softmax(1)[0]
    pairs = chances + sum(chances[j] * chances / (1 - chances[j]) * (torch.arange(16) != j) for j in range(16))
    for per_layer, expected in ((1, chances), (2, pairs)):
        drawn = draws(rows, 4000, per_layer)
        assert (drawn.sum(2) == per_layer).all()
        counts = drawn.sum(0)[0].double()
        chi_square = float(((counts - 4000 * expected) ** 2 / (4000 * expected)).sum())
        assert chi_square < 40  # 15 degrees of freedom: exceeded once in 2000 draws


def test_g7_samples_that_point_away_are_drawn_too() -> None:
    rows = torch.randn(400, 16, generator=seeded(3))
    scores = standardised(rows)
    drawn = draw(scores, ALL, 8, "stochastic", seeded(4))
    best = draw(scores, ALL, 8, "top_k_per_layer", seeded(4))
    assert 0.2 < float((rows[drawn] < 0).double().mean()) < 0.35
    assert 0.4 < float(rows[drawn].mean()) < 0.58 < float(rows[best].mean())


def test_g8_fresh_adapters_are_scored_by_their_second_matrix() -> None:
    """At B = 0 the gradient of A is zero."""
    capture = GradientCapture(load_model(MODELS["lora"](), seed=0).model)
    interaction = Interaction(capture.run(make_batch(LENGTHS)), random_like(capture, 6), plain)
    for name, utilities_N in interaction.utilities_by_parameter.items():
        assert bool(utilities_N.any()) == ("lora_B" in name)
    decision = routed(interaction, 3)
    assert decision.coefficients_LN is not None
    assert torch.isfinite(decision.coefficients_LN).all()


def test_g9_layers_draw_independently_and_a_seed_repeats_it() -> None:
    rows = random_rows(layers=1).expand(2, 16)  # the same scores in both layers
    drawn = draws(rows, 500).double()
    chances = drawn.mean((0, 1))
    together = (drawn[:, 0] * drawn[:, 1]).mean(0)
    assert float((together - chances**2).abs().max()) < 0.08
    scores = standardised(random_rows())
    masks = [draw(scores, ALL, 8, "stochastic", seeded(seed)) for seed in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_g10_the_draw_leans_towards_the_target_and_heat_takes_that_away() -> None:
    rows = random_rows(layers=200, seed=5)
    scores = standardised(rows)
    means = {
        temperature: float(rows[draw(scores / temperature, ALL, 8, "stochastic", seeded(6))].mean())
        for temperature in (0.01, 1.0, 1e9)
    }
    best = float(rows[draw(scores, ALL, 8, "top_k_per_layer", seeded())].mean())
    assert means[0.01] == pytest.approx(best, abs=0.02)
    assert means[1.0] > float(rows.mean()) + 0.2
    assert means[1e9] == pytest.approx(float(rows.mean()), abs=0.08)


def test_g12_controls() -> None:
    rows = random_rows()
    shared = draws(rows, 20, rule="random_k_shared")
    assert (shared == shared[:, :1]).all()
    apart = draws(rows, 20, rule="random_k_per_layer")
    assert not (apart == apart[:, :1]).all()
    for random in (shared, apart):
        assert (random.sum(2) == 8).all()
        assert float((random.double().mean((0, 1)) - 0.5).abs().max()) < 0.4
    best = draws(rows, 3, rule="top_k_per_layer")
    assert (best == best[:1]).all()
    for layer in range(4):
        assert set(rows[layer].topk(8).indices.tolist()) == set(best[0, layer].nonzero().squeeze(1).tolist())


@pytest.mark.parametrize("rule", ["stochastic", "random_k_per_layer", "random_k_shared", "top_k_per_layer"])
def test_only_samples_that_may_enter_are_drawn_and_sums_are_kept(rule: Rule) -> None:
    coefficients_N = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])
    may_enter_N = coefficients_N > 0
    drawn = draw(standardised(random_rows(6, 5)), may_enter_N, 2, rule, seeded())
    assert (drawn.sum(1) == 2).all()
    assert not drawn[:, ~may_enter_N].any()
    weights_LN = spread(coefficients_N, drawn)
    torch.testing.assert_close(weights_LN.sum(1), torch.ones(6))
    for layer in range(6):
        i, j = drawn[layer].nonzero().squeeze(1).tolist()
        assert float(weights_LN[layer, i] / weights_LN[layer, j]) == pytest.approx(
            float(coefficients_N[i] / coefficients_N[j])
        )
    everyone = draw(standardised(random_rows(6, 5)), may_enter_N, 9, rule, seeded())
    torch.testing.assert_close(spread(coefficients_N, everyone), coefficients_N.expand(6, 5))


@pytest.mark.parametrize("rule", ["stochastic", "random_k_per_layer", "top_k_per_layer"])
def test_a_score_that_is_not_finite_is_never_drawn(rule: Rule) -> None:
    rows = random_rows(3, 16)
    rows[:, 2] = torch.nan
    drawn = draw(standardised(rows), ALL, 16, rule, seeded())
    assert not drawn[:, 2].any()
    assert (drawn.sum(1) == 15).all()


def test_it_routes_what_a_selector_selected() -> None:
    interaction = block_pool(torch.tensor([[3.0, 2.0, -9.0, 1.0], [1.0, 2.0, -9.0, 3.0]]))
    decision = Gast(1, seeded(), "top_k_per_layer").route(TopK(3).decide(interaction), interaction)
    assert decision.coefficients_LN is not None
    assert decision.coefficients_LN.tolist() == [[1.0, 0, 0, 0], [0, 0, 0, 1.0]]
    assert decision.selected == [0, 3]
    assert decision.num_positive == 3


def test_nothing_is_drawn_where_nothing_was_selected() -> None:
    interaction = block_pool(-torch.ones(2, 4))
    decision = Gast(1, seeded()).route(TopK(2).decide(interaction), interaction)
    assert decision.coefficients_LN is None
    assert decision.selected == []


def test_the_entropy_says_how_undecided_a_layer_was() -> None:
    """1 where all that may enter are alike, less where one stands out; nothing else of the decision changes."""
    interaction = block_pool(torch.tensor([[1.0, 1.0, 1.0, 1.0], [9.0, 0.1, 0.1, 0.1]]))
    decision = Equal().decide(interaction)
    routed = Gast(1, seeded()).route(decision, interaction)
    assert routed.route_entropy_L is not None
    flat, steep = routed.route_entropy_L.tolist()
    assert flat == pytest.approx(1.0)
    assert steep < 0.9
    assert torch.equal(routed.coefficients_N, decision.coefficients_N)


def test_the_state_is_the_generators() -> None:
    interaction = block_pool(random_rows())
    first, again = Gast(3, seeded()), Gast(3, seeded(9))

    def drawn(route: Gast) -> Tensor:
        coefficients_LN = route.route(Equal().decide(interaction), interaction).coefficients_LN
        assert coefficients_LN is not None
        return coefficients_LN

    drawn(first)
    again.load_state_dict(first.state_dict())
    assert torch.equal(drawn(first), drawn(again))
    assert not torch.equal(drawn(first), drawn(Gast(3, seeded(9))))
