"""DualSFT against dense autograd on several families of models, every trainable parameter included.

Named after the invariants they prove, T23 to T33; `test_masked_adamw` and `test_rule` hold T29 and T31 for their parts.
"""

import copy
import itertools
import math

import pytest
import torch
from gradient_selectors.capture.batch import Batch
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.mask.dual_sft import (
    Anchors,
    Curvature,
    DualSft,
    Response,
    adam_curvature,
    column_scores,
    direction,
    masked_curvature,
    no_curvature,
    row_scores,
)
from gradient_selectors.mask.masked_adamw import MaskedAdamW
from gradient_selectors.mask.rule import Granularity, MaskRule, choose_mask, unit_size
from gradient_selectors.mask.self_distillation import prior_gradient
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.oracle import Dense, dense, in_float64, make_batch, make_model, random_like, relative_error

LENGTHS = (12, 7, 9, 12, 5, 10, 8, 6)
KINDS = ("llama", "qwen2_tied", "gpt2", "lora")
EXACT = 1e-5  # relative, float32
RATE = 40.0  # large enough for the second-order term to carry weight


class Scored:
    """A model's scores from the library, and all that they are made of, dense."""

    def __init__(self, kind: str, response: Response, curved: bool = True) -> None:
        self.model = make_model(kind)
        self.capture = GradientCapture(self.model)
        self.batch, target = make_batch(LENGTHS), make_batch((9, 11), seed=4)
        self.pool = self.capture.run(self.batch)
        count = len(LENGTHS)
        self.mean = self.pool.weighted_gradient(torch.full((count,), 1 / count))
        self.new = self.capture.run(target).weighted_gradient(torch.full((2,), 0.5))
        self.prior = {name: values - 1 for name, values in random_like(self.capture, 5).items()}
        self.answers = {name: values - 1 for name, values in random_like(self.capture, 7).items()}
        self.h = random_like(self.capture, 6)
        curvature: Curvature = self.h.__getitem__ if curved else no_curvature
        self.u = direction(response, self.mean, self.new, self.prior, curvature, self.answers)
        self.columns, self.rows = column_scores(self.u, self.mean), row_scores(self.pool, self.u)

    @property
    def oracle(self) -> Dense:
        return dense(self.model, self.batch)


@pytest.mark.parametrize("kind", KINDS)
def test_t23_columns_and_rows_are_sums_of_one_matrix(kind: str) -> None:
    response = Response(RATE, lambda_new=1.0, lambda_prior=0.3, lambda_anchor=0.7)
    scored = Scored(kind, response)
    oracle = scored.oracle
    target = dense(scored.model, make_batch((9, 11), seed=4)).gradients.mean(0)
    mean = oracle.gradients.mean(0)
    guards = 0.3 * oracle.flat(scored.prior) + 0.7 * oracle.flat(scored.answers)
    u = target + guards - 0.5 * RATE * oracle.flat(scored.h) * mean
    matrix = u * oracle.gradients / len(LENGTHS)
    assert relative_error(oracle.flat(scored.columns), matrix.sum(0)) < EXACT
    assert relative_error(scored.rows / len(LENGTHS), matrix.sum(1)) < EXACT
    total = float(u.double() @ mean.double())
    assert math.isclose(float(oracle.flat(scored.columns).double().sum()), total, rel_tol=EXACT)
    assert math.isclose(float(scored.rows.double().mean()), total, rel_tol=EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_t24_scores_add_up_to_the_predicted_improvement(kind: str) -> None:
    scored = Scored(kind, Response(RATE, lambda_prior=0.0))
    oracle = scored.oracle
    mean, target, h = (oracle.flat(values).double() for values in (scored.mean, scored.new, scored.h))
    improvement = float(target @ mean - 0.5 * RATE * (mean @ (h * mean)))
    assert math.isclose(float(oracle.flat(scored.columns).double().sum()), improvement, rel_tol=EXACT)
    assert math.isclose(float(scored.rows.double().mean()), improvement, rel_tol=EXACT)


@pytest.mark.parametrize("kind", ["llama", "lora"])
def test_t25_row_scores_are_shapley_values(kind: str) -> None:
    """Every coalition of eight samples, by the value of the step it would make together."""
    scored = Scored(kind, Response(RATE, lambda_prior=0.3))
    oracle, count = scored.oracle, len(LENGTHS)
    shares = oracle.gradients.double() / count
    guide = oracle.flat(scored.new).double() + 0.3 * oracle.flat(scored.prior).double()
    h = oracle.flat(scored.h).double()
    members = torch.tensor(list(itertools.product((0.0, 1.0), repeat=count)), dtype=torch.float64)
    steps = members @ shares
    values = steps @ guide - 0.5 * RATE * (steps.square() @ h)
    sizes = members.sum(1)
    weight_without = torch.tensor([1 / (count * math.comb(count - 1, size)) for size in range(count)])
    shapley = []
    for n in range(count):
        without, inside = members[:, n] == 0, members[:, n] == 1
        # Enumeration pairs each coalition without n with the one that differs in n alone.
        gains = values[inside] - values[without]
        shapley.append((gains * weight_without[sizes[without].long()]).sum())
    assert relative_error(scored.rows / count, torch.stack(shapley)) < EXACT


def test_t25_column_scores_are_exact_contributions_of_the_weights() -> None:
    """Without one weight's movement the improvement lacks exactly that weight's score."""
    scored = Scored("llama", Response(RATE, lambda_prior=0.0))
    oracle = scored.oracle
    mean, target, h = (oracle.flat(values).double() for values in (scored.mean, scored.new, scored.h))

    def improvement(step: Tensor) -> Tensor:
        return target @ step - 0.5 * RATE * (step @ (h * step))

    columns = oracle.flat(scored.columns).double()
    for k in columns.abs().topk(5).indices.tolist():
        without = mean.clone()
        without[k] = 0
        assert math.isclose(float(improvement(mean) - improvement(without)), float(columns[k]), rel_tol=1e-4)


@pytest.mark.parametrize("response", [Response(0.0, lambda_prior=0.0), Response(RATE, lambda_prior=0.0)])
def test_t26_without_curvature_the_scores_are_first_order(response: Response) -> None:
    scored = Scored("llama", response, curved=response.learning_rate == 0)
    oracle = scored.oracle
    target = oracle.flat(scored.new)
    assert relative_error(scored.rows, oracle.gradients @ target) < EXACT
    assert relative_error(oracle.flat(scored.columns), target * oracle.gradients.mean(0)) < EXACT


def test_t26_without_any_term_all_scores_are_zero() -> None:
    scored = Scored("llama", Response(RATE, lambda_new=0.0, lambda_prior=0.0), curved=False)
    assert not scored.rows.any()
    assert not any(values.any() for values in scored.columns.values())


def test_t27_the_learning_rate_changes_second_order_rankings_only() -> None:
    def ranking(rate: float, curved: bool) -> list[int]:
        return Scored("llama", Response(rate, lambda_prior=0.0), curved).rows.argsort().tolist()

    assert ranking(1e-5, curved=False) == ranking(1e3, curved=False)
    assert ranking(1e-5, curved=True) != ranking(1e3, curved=True)


@pytest.mark.parametrize("kind", [*KINDS, "gemma2_capped"])
def test_t28_the_prior_is_zero_where_model_and_base_agree(kind: str) -> None:
    model = make_model(kind)
    gradient = prior_gradient(GradientCapture(model), copy.deepcopy(model), [make_batch((9, 6))])
    assert gradient
    assert not any(values.any() for values in gradient.values())


@pytest.mark.parametrize("kind", [*KINDS, "gemma2_capped", "lora_checkpointing"])
def test_the_prior_is_confidence_weighted_self_distillation(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's own divergence on whole logits, one sample at a time, without padding; rows in small chunks."""
    monkeypatch.setattr("gradient_selectors.mask.self_distillation.CHUNK_ELEMENTS", 900)
    model, base = make_model(kind), make_model(kind)
    moved(base)
    batches = [make_batch((9, 6)), make_batch((11,), seed=2)]
    got = prior_gradient(GradientCapture(model), base, batches, temperature=1.5)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    divergences, omegas = [], []
    with in_float64(model), in_float64(base):
        for batch in batches:
            for i, length in enumerate(batch.lengths):
                ids, inside = batch.input_ids_NT[i : i + 1, :length], batch.labels_NT[i, 1:length] != -100
                with torch.no_grad():
                    teacher = base(input_ids=ids, use_cache=False).logits[0, :-1][inside].div(1.5).softmax(1)
                student = model(input_ids=ids, use_cache=False).logits[0, :-1][inside].div(1.5).log_softmax(1)
                divergences.append(F.kl_div(student, teacher, reduction="batchmean"))
                omegas.append(float(teacher.amax(1).mean()))
        weighted = torch.stack([w * d for w, d in zip(omegas, divergences, strict=True)]).sum()
        want = torch.autograd.grad(1.5**2 * weighted / sum(omegas), list(parameters.values()))
    assert got.keys() == parameters.keys()
    flat = torch.cat([got[name].flatten() for name in parameters])
    assert relative_error(flat, torch.cat([values.flatten() for values in want])) < EXACT
    assert all(parameter.grad is None for parameter in parameters.values())


def test_a_prior_without_samples_is_refused() -> None:
    model = make_model("llama")
    with pytest.raises(ValueError, match="at least one sample"):
        prior_gradient(GradientCapture(model), model, [])


def moved(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


class Online:
    """A model that trains under a mask that is refreshed."""

    def __init__(
        self, refresh_steps: int = 3, density: float = 0.1, decay: float = 0.9, granularity: Granularity = "weight"
    ) -> None:
        self.capture = GradientCapture(make_model("llama"))
        parameters = self.capture.parameters
        self.optimizer = MaskedAdamW(parameters.items(), lr=1e-2, weight_decay=0.1, granularity=granularity)
        rule = MaskRule(density, granularity)
        self.selector = DualSft(rule, Response(RATE, lambda_prior=0.0), refresh_steps, decay)
        self.largest_unit = max(unit_size(parameter.shape, granularity) for parameter in parameters.values())
        self.total = sum(parameter.numel() for parameter in self.capture.parameters.values())
        target = self.capture.run(make_batch((9, 11), seed=4))
        self.target = target.weighted_gradient(torch.full((2,), 0.5))
        self.refreshed: list[int] = []

    def step(self, number: int) -> dict[str, Tensor]:
        gradient = self.capture.run(make_batch((8, 6), seed=20 + number)).weighted_gradient(torch.full((2,), 0.5))
        self.selector.observe(gradient)
        if self.selector.due:
            change = self.selector.refresh(self.optimizer, self.target)
            assert 0 <= round(self.selector.rule.density * self.total) - change.kept < self.largest_unit
            self.refreshed.append(number)
        for name, parameter in self.capture.parameters.items():
            parameter.grad = gradient[name]
        self.optimizer.step()
        return gradient

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.capture.parameters.items()}


def test_t30_masked_weights_stay_bit_for_bit_while_masks_change() -> None:
    """Weight decay included: whatever the mask of a step leaves out is the same after it."""
    online = Online(refresh_steps=3)
    changed = 0
    for number in range(8):
        before = online.weights()
        online.step(number)
        for name, parameter in online.capture.parameters.items():
            moves = online.optimizer.mask(name) > 0
            assert torch.equal(parameter[~moves], before[name][~moves])
            changed += int((parameter[moves] != before[name][moves]).sum())
    assert online.refreshed == [0, 1, 3, 6]
    assert changed > 0


def test_t31_everything_kept_is_full_fine_tuning() -> None:
    online = Online(density=1.0)
    reference = GradientCapture(make_model("llama"))
    optimizer = torch.optim.AdamW(reference.parameters.values(), lr=1e-2, weight_decay=0.1)
    for number in range(5):
        gradient = online.step(number)
        for name, parameter in reference.parameters.items():
            parameter.grad = gradient[name]
        optimizer.step()
    for name, parameter in reference.parameters.items():
        torch.testing.assert_close(online.capture.parameters[name], parameter, rtol=1e-5, atol=1e-6)


def test_t32_turning_the_target_round_turns_both_rankings_round() -> None:
    response = Response(0.0, lambda_prior=0.0)
    scored = Scored("llama", response)
    negated = {name: -values for name, values in scored.new.items()}
    u = direction(response, scored.mean, negated, None, no_curvature)
    assert torch.equal(row_scores(scored.pool, u), -scored.rows)
    columns = column_scores(u, scored.mean)
    assert all(torch.equal(columns[name], -values) for name, values in scored.columns.items())


def test_t33_a_pool_twice_over_scores_the_same() -> None:
    """With means, as here; with the release's sum the second-order term would double."""
    response = Response(RATE, lambda_prior=0.0)
    scored = Scored("llama", response)
    twice = scored.capture.run(make_batch_twice())
    mean = twice.weighted_gradient(torch.full((2 * len(LENGTHS),), 1 / (2 * len(LENGTHS))))
    u = direction(response, mean, scored.new, None, scored.h.__getitem__)
    rows = row_scores(twice, u)
    torch.testing.assert_close(rows[: len(LENGTHS)], scored.rows, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rows[len(LENGTHS) :], rows[: len(LENGTHS)], rtol=1e-4, atol=1e-6)
    columns = column_scores(u, mean)
    for name, values in scored.columns.items():
        torch.testing.assert_close(columns[name], values, rtol=1e-3, atol=1e-6)


def make_batch_twice() -> Batch:
    once = make_batch(LENGTHS)
    return Batch(
        torch.cat([once.input_ids_NT, once.input_ids_NT]), torch.cat([once.labels_NT, once.labels_NT]), LENGTHS * 2
    )


def test_the_curvature_of_torchs_adam_is_corrected_for_bias() -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([weight], betas=(0.9, 0.99))
    curvature = adam_curvature(optimizer, {"weight": weight})
    assert curvature("weight") is None
    for _ in range(4):
        weight.grad = torch.tensor([1.0, 2.0, 3.0])
        optimizer.step()
    got = curvature("weight")
    assert got is not None
    torch.testing.assert_close(got, torch.tensor([1.0, 4.0, 9.0]))


def test_masked_weights_are_given_the_curvature_of_their_kept_neighbours() -> None:
    weights = {name: nn.Parameter(torch.zeros(3)) for name in ("near", "far")}
    optimizer = MaskedAdamW(weights.items())
    optimizer.replace_mask({"near": torch.tensor([True, True, False]), "far": torch.zeros(3, dtype=torch.bool)})
    for _ in range(5):
        for weight in weights.values():
            weight.grad = torch.tensor([2.0, 4.0, 6.0])
        optimizer.step()
    mean = {name: torch.tensor([1.0, 2.0, 3.0]) for name in weights}
    curvature = masked_curvature(optimizer, mean)
    # The kept weights' second moment is 4 times their squared mean.
    for name in weights:
        got = curvature(name)
        assert got is not None
        torch.testing.assert_close(got, torch.tensor([4.0, 16.0, 36.0]))


def test_the_average_forgets_and_is_corrected_for_its_beginning() -> None:
    online = Online(density=0.2, decay=0.5)
    generator = torch.Generator().manual_seed(0)
    gradients = [
        {name: torch.randn(p.shape, generator=generator) for name, p in online.capture.parameters.items()}
        for _ in range(3)
    ]
    for gradient in gradients:
        online.selector.observe(gradient)
    online.selector.refresh(online.optimizer, online.target)
    weights = torch.tensor([0.125, 0.25, 0.5]) / 0.875
    mean = {
        name: sum(weight * gradient[name] for weight, gradient in zip(weights, gradients, strict=True))
        for name in online.capture.parameters
    }
    scores = torch.cat([(online.target[name] * mean[name]).flatten() for name in mean])
    kept = torch.cat([online.optimizer.mask(name).flatten() for name in mean]) > 0
    # Quotas take 40 % of the budget; the rest is simply the best.
    best = scores.topk(int(0.6 * round(0.2 * online.total))).indices
    assert kept[best].all()


@pytest.mark.parametrize("granularity", ["weight", "row"])
def test_a_refresh_chooses_by_the_column_scores(granularity: Granularity) -> None:
    """Curvature, prior and anchors included."""
    online = Online(granularity=granularity)
    for number in range(3):
        online.step(number)
    online.selector.response = response = Response(RATE, lambda_prior=0.3, lambda_anchor=0.7)
    prior, anchor = (random_like(online.capture, seed) for seed in (5, 6))
    state = online.selector.state_dict()
    mean = {name: values / (1 - 0.9 ** state["observed"]) for name, values in state["average"].items()}
    u = direction(response, mean, online.target, prior, masked_curvature(online.optimizer, mean), anchor)
    expected = choose_mask(column_scores(u, mean), online.selector.rule)
    online.selector.refresh(online.optimizer, online.target, prior, anchor)
    for name, mask in expected.items():
        assert torch.equal(online.optimizer.mask(name) > 0, mask)


def test_a_refresh_needs_a_gradient() -> None:
    online = Online()
    assert not online.selector.due
    with pytest.raises(ValueError, match="observe"):
        online.selector.refresh(online.optimizer, online.target)


def test_a_mask_is_chosen_anew_when_twice_as_many_gradients_are_known() -> None:
    """Until `refresh_steps` have gone by: the first mask knows one gradient, and nothing of what was forgotten."""
    online = Online(refresh_steps=5)
    for number in range(20):
        online.step(number)
    assert [number + 1 for number in online.refreshed] == [1, 2, 4, 8, 13, 18]


def test_the_state_of_the_selector_travels() -> None:
    first, again = Online(), Online()
    for number in range(4):
        first.step(number)
    again.selector.load_state_dict(copy.deepcopy(first.selector.state_dict()))
    again.optimizer.load_state_dict(first.optimizer.state_dict())
    with torch.no_grad():
        for name, parameter in again.capture.parameters.items():
            parameter.copy_(first.capture.parameters[name])
    for number in range(4, 9):
        first.step(number)
        again.step(number)
    assert first.refreshed == [0, 1, 3, 6]
    assert again.refreshed == [6]
    for name, parameter in again.capture.parameters.items():
        assert torch.equal(parameter, first.capture.parameters[name])


def test_no_copy_of_the_model_is_kept_where_self_distillation_counts_for_nothing() -> None:
    model, batches = make_model("llama"), [make_batch(LENGTHS)]
    teacher = Anchors.of(model, batches, Response(lambda_prior=0.2)).teacher
    assert teacher is not None
    assert teacher is not model
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert Anchors.of(model, batches, Response(lambda_prior=0.0)).teacher is None
