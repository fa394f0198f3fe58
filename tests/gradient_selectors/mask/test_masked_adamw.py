"""The masked optimizer against torch's own, weight by weight, while masks change."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from gradient_selectors.mask.masked_adamw import MaskedAdamW
from gradient_selectors.mask.rule import Granularity
from gradient_selectors.preconditioner import adam_preconditioner, anticipated
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

SHAPES = {"matrix": (7, 5), "table": (9, 4), "norm": (6,)}
BETAS, RATE, EPS, DECAY = (0.9, 0.99), 0.05, 1e-8, 0.1


def make_parameters(seed: int = 0, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def make_masks(density: float, seed: int, rows: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, shape in SHAPES.items():
        units = (shape[0],) + (1,) * (len(shape) - 1) if rows else shape
        masks[name] = (torch.rand(units, generator=generator) < density).expand(shape).clone()
    return masks


def make_gradients(steps: int, seed: int = 9) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in range(steps)]


def give(parameters: dict[str, nn.Parameter], gradients: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.grad = gradients[name].clone()


def masked(parameters: Mapping[str, nn.Parameter], granularity: Granularity = "weight") -> MaskedAdamW:
    return MaskedAdamW(parameters.items(), RATE, BETAS, EPS, DECAY, granularity)


def dense_adamw(parameters: Mapping[str, nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters.values(), lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY)


def train(optimizer: MaskedAdamW, gradients: Sequence[dict[str, Tensor]]) -> None:
    for gradient in gradients:
        give(optimizer.parameters, gradient)
        optimizer.step()


def adamw_by_hand(start: Tensor, plan: Sequence[tuple[Tensor, Sequence[Tensor]]]) -> Tensor:
    """AdamW in float64 under masks and the gradients of each: every weight begins afresh whenever it joins."""
    weight, (beta1, beta2) = start.double(), BETAS
    first, second, age = (torch.zeros_like(weight) for _ in range(3))
    for mask, gradients in plan:
        first, second, age = first * mask, second * mask, age * mask
        for gradient in gradients:
            age = age + 1
            first = beta1 * first + (1 - beta1) * gradient
            second = beta2 * second + (1 - beta2) * gradient**2
            step = (first / (1 - beta1**age)) / ((second / (1 - beta2**age)).sqrt() + EPS)
            moved = weight * (1 - RATE * DECAY) - RATE * step
            weight = torch.where(mask, moved, weight)
        first, second, age = first * mask, second * mask, age * mask
    return weight


@pytest.mark.parametrize("granularity", ["weight", "row"])
def test_kept_weights_move_as_under_torchs_adamw_and_masked_ones_stay_bit_for_bit(granularity: Granularity) -> None:
    parameters, reference = make_parameters(), make_parameters()
    optimizer, dense = masked(parameters, granularity=granularity), dense_adamw(reference)
    masks = make_masks(0.4, seed=1, rows=granularity == "row")
    optimizer.replace_mask(masks)
    for gradient in make_gradients(12):
        give(parameters, gradient)
        give(reference, gradient)
        optimizer.step()
        dense.step()
    start = make_parameters()
    for name, mask in masks.items():
        assert 0 < int(mask.sum()) < mask.numel()
        torch.testing.assert_close(parameters[name][mask], reference[name][mask], rtol=1e-6, atol=1e-6)
        assert torch.equal(parameters[name][~mask], start[name][~mask])


def test_t31_a_mask_of_everything_is_plain_adamw() -> None:
    parameters, reference = make_parameters(), make_parameters()
    optimizer, dense = masked(parameters), dense_adamw(reference)
    optimizer.replace_mask(make_masks(1.1, seed=0))
    for gradient in make_gradients(5):
        give(parameters, gradient)
        give(reference, gradient)
        optimizer.step()
        dense.step()
    for name in SHAPES:
        torch.testing.assert_close(parameters[name], reference[name], rtol=1e-6, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(
    plan=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=5),
    rows=st.booleans(),
)
def test_every_weight_follows_an_adamw_that_began_when_it_joined(
    plan: list[tuple[float, int, int]], rows: bool
) -> None:
    """Any sequence of masks, with any number of steps (none too) between them."""
    parameters, start = make_parameters(), make_parameters()
    optimizer = masked(parameters, granularity="row" if rows else "weight")
    before = make_masks(-1, seed=0)
    done: list[tuple[dict[str, Tensor], list[dict[str, Tensor]]]] = []
    for number, (density, seed, steps) in enumerate(plan):
        masks, gradients = make_masks(density, seed, rows), make_gradients(steps, seed=number)
        change = optimizer.replace_mask(masks)
        assert change.kept == sum(int(mask.sum()) for mask in masks.values())
        assert change.joined == sum(int((masks[name] & ~before[name]).sum()) for name in SHAPES)
        assert change.left == sum(int((before[name] & ~masks[name]).sum()) for name in SHAPES)
        train(optimizer, gradients)
        done.append((masks, gradients))
        before = masks
    for name in SHAPES:
        assert torch.equal(optimizer.mask(name) > 0, before[name])
        want = adamw_by_hand(start[name].detach(), [(m[name], [g[name] for g in gs]) for m, gs in done])
        torch.testing.assert_close(parameters[name].double(), want, rtol=1e-5, atol=1e-5)
        never = ~torch.stack([masks[name] for masks, _ in done]).any(0)
        assert torch.equal(parameters[name][never], start[name][never])


def test_the_first_steps_of_a_joining_weight_are_no_longer_than_the_learning_rate() -> None:
    """Under the old step count a constant gradient would move it by several learning rates at once."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = MaskedAdamW([("weight", weight)], lr=0.01, weight_decay=0.0)
    optimizer.replace_mask({"weight": torch.tensor([True, False])})
    for step in range(60):
        if step == 40:
            optimizer.replace_mask({"weight": torch.tensor([True, True])})
        before = weight.detach().clone()
        weight.grad = torch.ones(2)
        optimizer.step()
        assert float((before - weight.detach()).abs().max()) <= 0.01 * (1 + 1e-5)


def nbytes(states: Sequence[dict[str, Tensor]]) -> int:
    return sum(tensor.nbytes for state in states for tensor in state.values())


@pytest.mark.parametrize(("granularity", "limit"), [("weight", 0.08), ("row", 0.06)])
def test_memory_falls_with_density(granularity: Granularity, limit: float) -> None:
    shapes = {f"layers.{i}.weight": (200, 100) for i in range(4)}
    parameters, reference = make_parameters(shapes=shapes), make_parameters(shapes=shapes)
    optimizer, dense = masked(parameters, granularity=granularity), torch.optim.AdamW(reference.values())
    masks = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
    for mask in masks.values():
        if granularity == "row":
            mask[::20] = True
        else:
            mask.view(-1)[::20] = True
    optimizer.replace_mask(masks)
    for members in (parameters, reference):
        for parameter in members.values():
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    dense.step()
    assert sum(int(mask.sum()) for mask in masks.values()) == 0.05 * 4 * 20_000
    ours = nbytes([optimizer.state[parameter] for parameter in parameters.values()])
    assert ours <= limit * nbytes([dense.state[parameter] for parameter in reference.values()])


def test_the_state_travels_as_flat_tensors() -> None:
    """A restored optimizer goes on bit for bit, cohorts of several ages included."""
    gradients = make_gradients(10)
    first = masked(make_parameters())
    for seed in (1, 2):
        first.replace_mask(make_masks(0.5, seed))
        train(first, gradients[:3])
    saved = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    assert saved.keys() == {
        f"{name}.{field}"
        for name in SHAPES
        for field in ("step", "kept", "exp_avg", "exp_avg_sq", "cohort_sizes", "cohort_joined")
    }
    again = masked({name: nn.Parameter(p.detach().clone()) for name, p in first.parameters.items()})
    again.load_state_dict(saved)
    for optimizer in (first, again):
        train(optimizer, gradients[6:8])
        optimizer.replace_mask(make_masks(0.5, seed=3))
        train(optimizer, gradients[8:])
    for name in SHAPES:
        assert torch.equal(first.parameters[name], again.parameters[name])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("matrix.exp_avg", torch.zeros(3, 2)),
        ("matrix.kept", torch.tensor([0, 35], dtype=torch.int32)),
        ("matrix.kept", torch.tensor([0.0, 1.0])),
        ("matrix.cohort_sizes", torch.tensor([1])),
        ("matrix.other", torch.zeros(1)),
        ("nowhere.kept", torch.zeros(0)),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_name(key: str, value: Tensor) -> None:
    optimizer = masked(make_parameters())
    masks = make_masks(-1, seed=0)
    masks["matrix"][0, :2] = True
    optimizer.replace_mask(masks)
    with pytest.raises(ValueError, match=key.partition(".")[0]):
        masked(make_parameters()).load_state_dict({**optimizer.state_dict(), key: value})


def test_what_torch_saves_of_an_optimizer_is_refused() -> None:
    optimizer = masked(make_parameters())
    with pytest.raises(ValueError, match="is not that of a masked optimizer"):
        optimizer.load_state_dict(dense_adamw(make_parameters()).state_dict())


def test_nothing_moves_before_the_first_mask() -> None:
    parameters = make_parameters()
    optimizer = masked(parameters)
    train(optimizer, make_gradients(2))
    assert all(torch.equal(parameters[name], start) for name, start in make_parameters().items())
    assert not any(optimizer.mask(name).any() for name in SHAPES)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {**make_masks(0.5, 1), "norm": torch.ones(6)},
        {**make_masks(0.5, 1), "norm": torch.ones(5, dtype=torch.bool)},
    ],
)
def test_a_mask_that_does_not_fit_changes_nothing(wrong: dict[str, Tensor]) -> None:
    optimizer = masked(make_parameters())
    optimizer.replace_mask(make_masks(0.5, seed=2))
    before = {name: optimizer.mask(name) for name in SHAPES}
    with pytest.raises(ValueError, match=r"the mask of (norm|matrix)"):
        optimizer.replace_mask(wrong)
    assert all(torch.equal(optimizer.mask(name), before[name]) for name in SHAPES)


def test_a_mask_that_cuts_through_a_row_is_refused_where_rows_are_kept() -> None:
    with pytest.raises(ValueError, match="the mask of matrix cuts through a row"):
        masked(make_parameters(), granularity="row").replace_mask(make_masks(0.5, seed=2))


def test_parameters_need_names() -> None:
    with pytest.raises(ValueError, match="named parameters"):
        MaskedAdamW([{"params": [nn.Parameter(torch.ones(2))]}])


def test_groups_keep_their_own_settings() -> None:
    parameters = make_parameters()
    optimizer = MaskedAdamW(
        [
            {"params": [("matrix", parameters["matrix"])], "weight_decay": 0.5},
            {"params": [("norm", parameters["norm"])], "weight_decay": 0.0},
        ],
        lr=0.1,
    )
    optimizer.replace_mask({name: torch.ones(SHAPES[name], dtype=torch.bool) for name in ("matrix", "norm")})
    for name in ("matrix", "norm"):
        parameters[name].grad = torch.zeros(SHAPES[name])
    start = make_parameters()
    optimizer.step()
    torch.testing.assert_close(parameters["matrix"], start["matrix"] * 0.95)
    assert torch.equal(parameters["norm"], start["norm"])


def test_clipping_can_be_made_to_see_only_what_moves() -> None:
    optimizer = masked(make_parameters())
    masks = make_masks(0.3, seed=4)
    optimizer.replace_mask(masks)
    (gradient,) = make_gradients(1)
    give(optimizer.parameters, gradient)
    optimizer.mask_gradients()
    for name, mask in masks.items():
        found = optimizer.parameters[name].grad
        assert found is not None
        assert torch.equal(found, gradient[name] * mask)


def test_the_preconditioner_of_a_mask_is_adams_inside_and_zero_outside() -> None:
    parameters, reference = make_parameters(), make_parameters()
    optimizer, dense = masked(parameters), dense_adamw(reference)
    masks = make_masks(0.5, seed=1)
    optimizer.replace_mask(masks)
    for gradient in make_gradients(6):
        gradient["table"][2] = 0.0  # a token that has not come up
        gradient["norm"][:] = 0.0
        give(parameters, gradient)
        give(reference, gradient)
        optimizer.step()
        dense.step()
    beta2 = BETAS[1]
    assert masks["table"][2].any()
    assert not optimizer.preconditioner("norm").any()
    for name, mask in masks.items():
        second = anticipated(dense.state[reference[name]]["exp_avg_sq"] * mask, 6, beta2)
        want = adam_preconditioner(second, 6, 1.0, BETAS, EPS)
        torch.testing.assert_close(optimizer.preconditioner(name), want)


def test_a_weight_that_just_joined_counts_like_the_others_of_its_parameter() -> None:
    optimizer = masked(make_parameters())
    masks = make_masks(0.5, seed=1)
    optimizer.replace_mask(masks)
    assert torch.equal(optimizer.preconditioner("matrix"), masks["matrix"].float())
    train(optimizer, make_gradients(6))
    before = optimizer.preconditioner("matrix")
    wider = {name: mask | make_masks(0.5, seed=2)[name] for name, mask in masks.items()}
    optimizer.replace_mask(wider)
    after, joined = optimizer.preconditioner("matrix"), wider["matrix"] & ~masks["matrix"]
    torch.testing.assert_close(after[masks["matrix"]], before[masks["matrix"]])
    assert joined.any()
    torch.testing.assert_close(after[joined], before[masks["matrix"]].mean().expand(int(joined.sum())))
    assert not after[~wider["matrix"]].any()


@pytest.mark.parametrize("granularity", ["weight", "row"])
def test_the_second_moment_is_known_only_where_something_has_moved(granularity: Granularity) -> None:
    rows = granularity == "row"
    optimizer = masked(make_parameters(), granularity)
    masks = make_masks(0.5, seed=1, rows=rows)
    assert [len(found) for found in optimizer.second_moments("matrix")] == [0, 0]
    optimizer.replace_mask(masks)
    assert [len(found) for found in optimizer.second_moments("matrix")] == [0, 0]
    gradients = make_gradients(4)
    train(optimizer, gradients)
    optimizer.replace_mask({name: mask | make_masks(0.5, seed=2, rows=rows)[name] for name, mask in masks.items()})
    beta2 = BETAS[1]
    weights = torch.tensor([(1 - beta2) * beta2 ** (3 - i) for i in range(4)]) / (1 - beta2**4)
    want = torch.stack([w * g["matrix"] ** 2 for w, g in zip(weights, gradients, strict=True)]).sum(0)
    units, second = optimizer.second_moments("matrix")
    found = torch.full_like(want, torch.nan).view(-1, second.shape[1])
    found[units] = second
    expected = want.where(masks["matrix"], torch.nan)
    torch.testing.assert_close(found.view_as(want), expected, equal_nan=True)


@pytest.mark.parametrize("granularity", ["weight", "row"])
def test_a_mask_by_positions_is_the_same_mask(granularity: Granularity) -> None:
    by_mask, by_units = (masked(make_parameters(), granularity) for _ in range(2))
    for seed in (1, 2, 3):
        masks = make_masks(0.4, seed, rows=granularity == "row")
        units = {
            name: mask.view(-1, 1 if granularity == "weight" else mask[0].numel())[:, 0].nonzero().squeeze(1).int()
            for name, mask in masks.items()
        }
        assert by_units.replace_units(units) == by_mask.replace_mask(masks)
        for optimizer in (by_mask, by_units):
            train(optimizer, make_gradients(2, seed))
        expected, found = by_mask.state_dict(), by_units.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
