"""The linearised Adam map against torch's own AdamW."""

from collections.abc import Callable

import pytest
import torch
from gradient_selectors.mask.masked_adamw import MaskedAdamW
from gradient_selectors.preconditioner import (
    AdamPreconditioner,
    adam_preconditioner,
    anticipated,
    at_rows,
    optimizer_steps,
    plain,
    preconditioner_of,
)

BETAS, EPS, RATE = (0.9, 0.99), 1e-8, 1e-2


def trained(steps: int, decay: float = 0.0) -> tuple[torch.nn.Parameter, torch.optim.AdamW, torch.Generator]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 5, generator=generator, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=RATE, betas=BETAS, eps=EPS, weight_decay=decay)
    for _ in range(steps):
        weight.grad = torch.randn(6, 5, generator=generator, dtype=torch.float64)
        optimizer.step()
    return weight, optimizer, generator


def update(gradient: torch.Tensor, steps: int, decay: float = 0.0) -> torch.Tensor:
    """What AdamW really does to the weight with this gradient, after `steps` earlier ones."""
    weight, optimizer, _ = trained(steps, decay)
    before = weight.detach().clone()
    weight.grad = gradient.clone()
    optimizer.step()
    return before - weight.detach()


@pytest.mark.parametrize("steps", [1, 10, 100, 1000])
def test_the_linearised_update_is_adamws_but_for_the_frozen_second_moment(steps: int) -> None:
    """The ratio of the two is known for every weight: sqrt((b2 (1 - b2^(t-1)) + (1 - b2) rho) / (1 - b2^t))."""
    weight, optimizer, generator = trained(steps)
    state, (beta1, beta2) = optimizer.state[weight], BETAS
    gradient = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    scale = adam_preconditioner(state["exp_avg_sq"], steps, RATE, BETAS, EPS).double()
    linearised = scale * gradient + scale * beta1 / (1 - beta1) * state["exp_avg"]
    rho = gradient**2 / (state["exp_avg_sq"] / (1 - beta2**steps))
    ratio = ((beta2 * (1 - beta2**steps) + (1 - beta2) * rho) / (1 - beta2 ** (steps + 1))).sqrt()
    torch.testing.assert_close(linearised, update(gradient, steps) * ratio, rtol=1e-5, atol=1e-9)


def test_weight_decay_cancels_from_the_difference_of_two_updates() -> None:
    generator = torch.Generator().manual_seed(7)
    one, two = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    without = update(one, 30) - update(two, 30)
    torch.testing.assert_close(update(one, 30, decay=0.1) - update(two, 30, decay=0.1), without, rtol=1e-9, atol=1e-12)


def test_weights_without_any_gradient_yet_have_no_preconditioner() -> None:
    """1 / eps for the rows of tokens that have not come up would drown everything else."""
    scale = adam_preconditioner(torch.tensor([[0.0, 0.0], [4e-6, 1e-6]]), 5, RATE, BETAS, EPS)
    assert scale[0].tolist() == [0, 0]
    assert float(scale[1, 1] / scale[1, 0]) == pytest.approx(2, rel=1e-4)


def test_the_anticipated_moment_is_that_after_a_gradient_of_the_usual_size() -> None:
    """Against torch's AdamW, given that gradient."""
    steps, beta2 = 20, BETAS[1]
    weight, optimizer, _ = trained(steps)
    second = optimizer.state[weight]["exp_avg_sq"].clone()
    usual = (second / (1 - beta2**steps)).mean().sqrt()
    found = anticipated(second, steps, beta2)
    weight.grad = torch.full_like(weight, usual)
    optimizer.step()
    after = optimizer.state[weight]["exp_avg_sq"] / (1 - beta2 ** (steps + 1))
    torch.testing.assert_close(found.double() / (1 - beta2**steps), after, rtol=1e-5, atol=0)


def test_a_weight_that_hardly_had_a_gradient_does_not_rule_the_preconditioner() -> None:
    """Frozen at its own moment, its P would be 10,000 times the others'; AdamW's real update is a few times theirs."""
    second = torch.full((8, 8), 1e-6)
    second[3, 4] = 1e-18
    frozen, found = (adam_preconditioner(v, 100, RATE, BETAS, EPS) for v in (second, anticipated(second, 100, 0.99)))
    assert float(frozen[3, 4] / frozen[0, 0]) > 1e4
    assert float(found[3, 4] / found[0, 0]) == pytest.approx(((1 - 0.99**100) / 0.01 / 1.0) ** 0.5, rel=0.02)
    torch.testing.assert_close(found[0, 0], frozen[0, 0], rtol=0.02, atol=0)


def test_anticipation_leaves_weights_without_a_gradient_out() -> None:
    second = torch.tensor([[0.0, 0.0], [4e-6, 4e-6]])
    assert anticipated(second, 5, 0.99)[0].tolist() == [0, 0]
    torch.testing.assert_close(anticipated(second, 5, 0.99)[1], anticipated(second[1], 5, 0.99))


def test_parameters_without_state_are_plain() -> None:
    weight, optimizer, _ = trained(0)
    assert AdamPreconditioner.of(optimizer, {"weight": weight})("weight") is None
    assert optimizer_steps(optimizer) == 0


def test_some_rows_have_the_values_that_they_have_among_all() -> None:
    """The usual size of a gradient is that of the whole parameter, also where rows have had none."""
    weight = torch.nn.Parameter(torch.ones(6, 3))
    optimizer = torch.optim.AdamW([weight], lr=RATE, betas=BETAS, eps=EPS)
    weight.grad = torch.arange(18.0).view(6, 3).mul_(torch.tensor([1.0, 0, 1, 1, 0, 1])[:, None])
    optimizer.step()
    preconditioner, rows = AdamPreconditioner.of(optimizer, {"weight": weight}), torch.tensor([1, 3, 5])
    whole = preconditioner("weight")
    assert whole is not None
    assert whole[1].tolist() == [0, 0, 0]
    for source in (preconditioner, lambda _name: whole):
        torch.testing.assert_close(at_rows(source, "weight", rows), whole[rows], rtol=1e-6, atol=0)
        all_rows = at_rows(source, "weight", None)
        assert all_rows is not None
        assert torch.equal(all_rows, whole)
    assert at_rows(plain, "weight", rows) is None


def test_a_warm_up_from_zero_keeps_the_preconditioner() -> None:
    weight, optimizer, _ = trained(5)
    before = AdamPreconditioner.of(optimizer, {"weight": weight})("weight")
    optimizer.param_groups[0]["lr"] = 0.0
    after = AdamPreconditioner.of(optimizer, {"weight": weight})("weight")
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)
    assert optimizer_steps(optimizer) == 5


def test_groups_count_by_their_learning_rate() -> None:
    weights = {name: torch.nn.Parameter(torch.ones(3)) for name in ("slow", "fast")}
    optimizer = torch.optim.AdamW(
        [{"params": [weights["slow"]], "lr": 0.1}, {"params": [weights["fast"]], "lr": 0.4}], betas=BETAS
    )
    for weight in weights.values():
        weight.grad = torch.ones(3)
    optimizer.step()
    preconditioner = AdamPreconditioner.of(optimizer, weights)
    slow, fast = preconditioner("slow"), preconditioner("fast")
    assert slow is not None
    assert fast is not None
    torch.testing.assert_close(fast, 4 * slow)


def stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(4, 3))


def test_adam_is_plain_until_it_has_warmed_up() -> None:
    w = weight()
    optimizer = torch.optim.AdamW([w], lr=RATE)
    assert preconditioner_of(optimizer, {"w": w}) is plain
    stepped(optimizer)
    assert preconditioner_of(optimizer, {"w": w}, warmup_steps=2) is plain
    found = preconditioner_of(optimizer, {"w": w})("w")
    want = AdamPreconditioner.of(optimizer, {"w": w})("w")
    assert found is not None
    assert want is not None
    assert torch.equal(found, want)


def test_sgd_is_plain() -> None:
    w = weight()
    assert preconditioner_of(stepped(torch.optim.SGD([w], lr=RATE, momentum=0.9)), {"w": w}) is plain


def test_a_masked_optimizer_answers_for_itself() -> None:
    """Its mask alone until its moments are trusted; everything counts before there is any mask."""
    w, mask = weight(), torch.eye(4, 3, dtype=torch.bool)
    optimizer = MaskedAdamW([("w", w)], lr=RATE)
    assert preconditioner_of(optimizer, {"w": w}) is plain
    optimizer.replace_mask({"w": mask})
    stepped(optimizer)
    cold, warm = (preconditioner_of(optimizer, {"w": w}, warmup)("w") for warmup in (2, 1))
    assert cold is not None
    assert warm is not None
    assert torch.equal(cold, mask.float())
    assert torch.equal(warm, optimizer.preconditioner("w"))


class Unknown(torch.optim.Optimizer):
    """Of no known kind; with `betas` and `eps` it looks like Adam and keeps something else."""

    def step(self, _closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["exp_inf"] = torch.ones_like(parameter)
        return None


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda w: Unknown([w], {}), "of Unknown is not known"),
        (lambda w: Unknown([w], {"betas": BETAS, "eps": EPS}), "Unknown keeps no exp_avg_sq"),
        (lambda w: torch.optim.Adagrad([w]), "of Adagrad is not known"),
        (lambda w: torch.optim.AdamW([w], amsgrad=True), "set amsgrad=False"),
    ],
    ids=["unknown", "without a second moment", "adagrad", "amsgrad"],
)
def test_an_optimizer_whose_preconditioner_is_not_known_is_named(
    make: Callable[[torch.nn.Parameter], torch.optim.Optimizer], says: str
) -> None:
    w = weight()
    with pytest.raises(ValueError, match=says):
        preconditioner_of(stepped(make(w)), {"w": w})
