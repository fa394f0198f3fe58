"""Masks: exact budgets, quotas, rows, and the selection by histograms against a sort."""

from collections.abc import Mapping

import pytest
import torch
from gradient_selectors.mask import rule as mask_module
from gradient_selectors.mask.rule import Granularity, MaskRule, choose_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

SHAPES = {
    "embed.weight": (20, 6),
    "layers.0.self_attn.q_proj.weight": (6, 6),
    "layers.0.mlp.up_proj.weight": (8, 6),
    "layers.0.norm.weight": (6,),
    "layers.1.self_attn.q_proj.weight": (6, 6),
    "layers.1.mlp.up_proj.weight": (8, 6),
    "layers.1.norm.weight": (6,),
}
TOTAL = sum(torch.Size(shape).numel() for shape in SHAPES.values())


def make_columns(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def plain(density: float, granularity: Granularity = "weight", absolute: bool = False) -> MaskRule:
    return MaskRule(density, granularity, absolute, layer_quota=0.0, module_quota=0.0)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0]), min_size=2, max_size=60),
    share=st.floats(0.01, 1),
    chunk=st.integers(1, 70),
    absolute=st.booleans(),
)
def test_the_best_are_kept_and_ties_go_to_the_earlier(
    values: list[float], share: float, chunk: int, absolute: bool
) -> None:
    """Any float32 at all, infinities, NaN and both zeros too, in chunks of any length."""
    scores = torch.tensor(values, dtype=torch.float32)
    columns = {"a": scores[: len(values) // 2].reshape(-1, 1), "b": scores[len(values) // 2 :]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_module, "CHUNK_ELEMENTS", chunk)
        got = flat(choose_mask(columns, plain(share, absolute=absolute)))
    ranked = torch.nan_to_num(scores.abs() if absolute else scores, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    order = torch.sort(ranked, descending=True, stable=True).indices[: max(1, round(share * len(values)))]
    assert torch.nonzero(got).squeeze(1).tolist() == sorted(order.tolist())


def chosen_by_sorting(columns: dict[str, Tensor], rule: MaskRule) -> dict[str, set[int]]:
    """Positions of units, from plain lists: sort what is left of each group, take while it fits, go on."""
    size = {name: 1 if rule.granularity == "weight" else values[0].numel() for name, values in columns.items()}
    scores = {name: values.view(-1, size[name]).mean(1).tolist() for name, values in columns.items()}
    layers, modules = ("layers.0", "layers.1"), ("q_proj", "up_proj")
    groups = [[name for name in columns if part in name] for part in (*layers, *modules)]
    groups.append([name for name in columns if not any(part in name for part in modules)])
    budget = round(rule.density * TOTAL)
    quotas = [int(rule.layer_quota * budget / 2)] * 2 + [int(rule.module_quota * budget / 3)] * 3
    taken: dict[str, set[int]] = {name: set() for name in columns}
    left = budget
    for group, quota in [*zip(groups, quotas, strict=True), (list(columns), budget)]:
        room = min(quota, left)
        free = [(-scores[name][i], g, i, name) for g, name in enumerate(group) for i in range(len(scores[name]))]
        for _, _, i, name in sorted(unit for unit in free if unit[2] not in taken[unit[3]]):
            if size[name] > room:
                break
            taken[name].add(i)
            room, left = room - size[name], left - size[name]
    return taken


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    levels=st.sampled_from([2, 7, 1000]),
    density=st.floats(0.01, 1),
    quotas=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)),
    chunk=st.integers(1, 150),
)
def test_quotas_choose_what_sorting_group_after_group_chooses(
    seed: int, levels: int, density: float, quotas: tuple[float, float], chunk: int
) -> None:
    """With many ties, few, or none, of values that are close and far apart."""
    columns = {name: (values.exp() * levels).round() / levels - 1 for name, values in make_columns(seed).items()}
    rule = MaskRule(density, "weight", False, *quotas)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_module, "CHUNK_ELEMENTS", chunk)
        masks = choose_mask(columns, rule)
    expected = chosen_by_sorting(columns, rule)
    assert {name: set(mask.flatten().nonzero().flatten().tolist()) for name, mask in masks.items()} == expected


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("density", [0.1, 0.4, 0.8])
def test_quotas_of_rows_choose_what_sorting_chooses(density: float, seed: int) -> None:
    """Rows of one length: norms have rows of one weight, and are left out."""
    columns = {name: values for name, values in make_columns(seed).items() if "norm" not in name}
    scale = TOTAL / sum(values.numel() for values in columns.values())
    masks = choose_mask(columns, MaskRule(density * scale, "row"))
    expected = chosen_by_sorting(columns, MaskRule(density, "row"))
    assert {name: set(mask[:, 0].nonzero().flatten().tolist()) for name, mask in masks.items()} == expected


def test_only_what_may_be_chosen_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []
    narrow = mask_module._narrow

    def watched(keys: dict[str, Tensor], cuts: Mapping[str, int]) -> dict[str, Tensor]:
        places = narrow(keys, cuts)
        looked_at.append(sum(values.numel() for values in keys.values()))
        return places

    monkeypatch.setattr(mask_module, "_narrow", watched)
    generator = torch.Generator().manual_seed(0)
    columns = {f"layers.{i}.up_proj": torch.randn(100, 100, generator=generator) for i in range(4)}
    choose_mask(columns, MaskRule(0.05))
    assert 2000 <= looked_at[0] <= 4000


@pytest.mark.parametrize("quota", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("density", [0.001, 0.05, 0.37, 0.9, 1.0])
def test_t29_budgets_are_exact_with_and_without_quotas(density: float, quota: float) -> None:
    for seed in range(3):
        columns = make_columns(seed)
        masks = choose_mask(columns, MaskRule(density, layer_quota=quota, module_quota=quota))
        assert {name: mask.shape for name, mask in masks.items()} == {n: torch.Size(s) for n, s in SHAPES.items()}
        assert int(flat(masks).sum()) == max(1, round(density * TOTAL))


def test_quotas_give_every_layer_and_module_group_its_share() -> None:
    """All good scores lie in the embedding, which without quotas would take everything."""
    columns = {name: torch.full(shape, -1.0) for name, shape in SHAPES.items()}
    columns["embed.weight"].fill_(1.0)
    best = "layers.1.mlp.up_proj.weight"
    columns[best][2, 3] = 0.5
    rule = MaskRule(100 / TOTAL)
    assert int(choose_mask(columns, plain(100 / TOTAL))["embed.weight"].sum()) == 100
    masks = choose_mask(columns, rule)
    kept = {name: int(mask.sum()) for name, mask in masks.items()}
    # 20 for the two layers, 20 for the groups q_proj, up_proj and other, which holds the embedding, and what is left.
    assert all(sum(kept[name] for name in SHAPES if f"layers.{i}." in name) >= 10 for i in range(2))
    assert sum(kept[name] for name in SHAPES if "q_proj" in name) >= 6
    assert sum(kept[name] for name in SHAPES if "up_proj" in name) >= 6
    assert kept["embed.weight"] == 100 - 20 - 2 * 6
    assert bool(masks[best][2, 3])


def test_a_group_smaller_than_its_quota_leaves_the_rest_to_all() -> None:
    columns = {"layers.0.norm.weight": torch.zeros(2), "embed.weight": torch.ones(50)}
    masks = choose_mask(columns, MaskRule(20 / 52, layer_quota=0.5, module_quota=0.0))
    assert [int(mask.sum()) for mask in masks.values()] == [2, 18]


def test_rows_are_kept_whole_and_ranked_by_their_mean() -> None:
    columns = make_columns(1)
    masks = choose_mask(columns, plain(0.3, granularity="row"))
    kept = {name: mask.reshape(len(mask), -1) for name, mask in masks.items()}
    assert all(torch.equal(rows.all(1), rows.any(1)) for rows in kept.values())
    budget = round(0.3 * TOTAL)
    assert budget - 6 < int(flat(masks).sum()) <= budget
    means = torch.cat([columns[name].reshape(len(columns[name]), -1).mean(1) for name in SHAPES])
    chosen = torch.cat([rows[:, 0] for rows in kept.values()])
    assert float(means[chosen].min()) >= float(means[~chosen].max())


def test_magnitude_keeps_what_harms_and_sign_does_not() -> None:
    columns = {"a": torch.tensor([3.0, -9.0, 2.0, 1.0])}
    assert choose_mask(columns, plain(0.5))["a"].tolist() == [True, False, True, False]
    assert choose_mask(columns, plain(0.5, absolute=True))["a"].tolist() == [True, True, False, False]


def test_scores_are_left_as_they_are() -> None:
    columns, before = make_columns(2), make_columns(2)
    choose_mask(columns, MaskRule(0.2, absolute=True))
    assert all(torch.equal(columns[name], before[name]) for name in SHAPES)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ((0.0, 0.2, 0.2), r"density=0\.0"),
        ((1.5, 0.2, 0.2), r"density=1\.5"),
        ((0.1, 0.7, 0.4), r"module_quota=0\.4"),
        ((0.1, -0.1, 0.2), r"layer_quota=-0\.1"),
    ],
)
def test_rules_that_make_no_sense_are_refused(wrong: tuple[float, float, float], says: str) -> None:
    density, layer_quota, module_quota = wrong
    with pytest.raises(ValueError, match=says):
        MaskRule(density, layer_quota=layer_quota, module_quota=module_quota)
