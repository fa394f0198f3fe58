"""A mask of parameters in rows is that of one process: thresholds from summed counts, ties by name and place."""

import pytest
import torch
from gradient_selectors.mask import rule as mask_module
from gradient_selectors.mask.rule import Granularity, MaskRule, choose_mask, choose_units, unit_keys, unit_size
from gradient_selectors.world.base import World
from gradient_selectors.world.deal import own_span
from torch import Tensor

from tests.gradient_selectors.mask.test_rule import SHAPES, chosen_by_sorting, make_columns
from tests.gradient_selectors.world.threads import ThreadWorld, on_ranks

STEP = 0.5  # few values, so that most thresholds are met by many


def tied_columns(seed: int) -> dict[str, Tensor]:
    columns = {name: (values / STEP).round() * STEP for name, values in make_columns(seed).items()}
    columns["embed.weight"][3:9] = 0.0
    return columns


def units_of_ranks(columns: dict[str, Tensor], rule: MaskRule, size: int) -> dict[str, list[int]]:
    """What ranks choose, numbered over the whole parameters. A `ThreadWorld` asserts that all make the same calls."""

    def choose(world: World) -> dict[str, list[int]]:
        sizes = {name: unit_size(values.shape, rule.granularity) for name, values in columns.items()}
        spans = {name: own_span(world, len(values)) for name, values in columns.items()}
        keys = {name: unit_keys(values[slice(*spans[name])].clone(), rule) for name, values in columns.items()}
        first = {name: spans[name][0] * values[0].numel() // sizes[name] for name, values in columns.items()}
        return {name: (units + first[name]).tolist() for name, units in choose_units(keys, sizes, rule, world).items()}

    ranks = on_ranks(size, choose)
    return {name: [unit for rank in ranks for unit in rank[name]] for name in columns}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("density", [0.05, 0.3, 0.8, 1.0])
def test_ranks_take_what_sorting_takes_of_single_weights(
    density: float, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mask_module, "CHUNK_ELEMENTS", 7)
    rule = MaskRule(density, layer_quota=0.3, module_quota=0.2)
    for columns in (tied_columns(1), make_columns(2)):
        found = units_of_ranks(columns, rule, size)
        assert {name: set(units) for name, units in found.items()} == chosen_by_sorting(columns, rule)
        assert all(units == sorted(units) for units in found.values())


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("granularity", ["weight", "row"])
def test_ranks_take_what_one_process_takes(granularity: Granularity, size: int) -> None:
    for seed, density in ((3, 0.1), (4, 0.4), (5, 0.7)):
        columns, rule = tied_columns(seed), MaskRule(density, granularity)
        found = units_of_ranks(columns, rule, size)
        for name, mask in choose_mask(columns, rule).items():
            chosen = mask.reshape(-1, unit_size(SHAPES_OF[name], granularity))[:, 0].nonzero().flatten()
            assert found[name] == chosen.tolist()


def test_calls_do_not_depend_on_where_scores_lie() -> None:
    """A rank without any chosen weight, or any weight at all, makes the calls of all."""
    columns = {"a.weight": torch.zeros(1, 4), "b.weight": torch.zeros(6, 4)}
    columns["b.weight"][4:] = 1.0
    calls = list[list[object]]()

    def choose(world: ThreadWorld) -> int:
        own = {name: values[slice(*own_span(world, len(values)))].clone() for name, values in columns.items()}
        keys = {name: unit_keys(values, MaskRule(0.2)) for name, values in own.items()}
        chosen = choose_units(keys, dict.fromkeys(own, 1), MaskRule(0.2), world)
        calls.append(list(world.calls))
        return sum(map(len, chosen.values()))

    assert on_ranks(3, choose) == [0, 0, 6]
    assert calls[0] == calls[1] == calls[2]


SHAPES_OF = {name: torch.Size(shape) for name, shape in SHAPES.items()}
