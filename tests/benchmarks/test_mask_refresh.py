"""The benchmark of the mask's refresh: that it checks before it times and reports all of it, never how fast."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from gradient_selectors.mask.rule import MaskRule, choose_units
from gradient_selectors.world.base import World
from torch import Tensor

from benchmarks import mask_refresh
from benchmarks.mask_refresh import PHASES, TINY, make_model, sorted_masks, summarise


def nothing_from_the_first(
    keys: dict[str, Tensor], sizes: Mapping[str, int], rule: MaskRule, world: World
) -> dict[str, Tensor]:
    """A choice that lacks one weight."""
    chosen = choose_units(keys, sizes, rule, world)
    name = next(name for name, units in chosen.items() if len(units))
    return {**chosen, name: chosen[name][1:]}


@pytest.mark.parametrize("granularity", ["weight", "row"])
def test_the_command_writes_every_phase(granularity: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mask.json"
    options = ["--json", str(path), "--tiny", "--rounds", "2", "--granularity", granularity, "--dtype", "bfloat16"]
    assert mask_refresh.main(options) == 0
    written = json.loads(path.read_text())
    assert set(written) == {
        *("version", "date", "machine", "threads"),
        *("shape", "rule", "dtype", "weights", "rounds", "summary"),
    }
    assert written["weights"] == sum(parameter.numel() for parameter in make_model(TINY).parameters())
    assert (written["rule"]["granularity"], written["dtype"]) == (granularity, "bfloat16")
    assert len(written["rounds"]) == 2
    for measured in written["rounds"]:
        assert set(measured) == {"plain_step", "observe", "refresh", *PHASES, "ratio"}
        assert min(measured.values()) > 0
        assert sum(measured[phase] for phase in PHASES) == pytest.approx(measured["refresh"])
        assert measured["ratio"] == measured["refresh"] / measured["plain_step"]
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 8
    assert "round 2 of 2" in said.err


def test_the_summary_is_of_each_figure_by_itself() -> None:
    rounds = [{"refresh": 1.0, "ratio": 0.5}, {"refresh": 4.0, "ratio": 0.1}, {"refresh": 2.0, "ratio": 0.2}]
    assert summarise(rounds) == {
        "refresh": {"median": 2.0, "min": 1.0, "max": 4.0},
        "ratio": {"median": 0.2, "min": 0.1, "max": 0.5},
    }


def test_nothing_is_timed_or_written_if_the_mask_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: object) -> None:
        raise AssertionError("timed")

    monkeypatch.setattr("gradient_selectors.mask.dual_sft.choose_units", nothing_from_the_first)
    monkeypatch.setattr(mask_refresh, "measure", measure)
    path = tmp_path / "mask.json"
    assert mask_refresh.main(["--json", str(path), "--tiny"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: the mask of refresh 1 differs from a sort's in 1 weights"
    assert not path.exists()


def test_the_sort_gives_every_group_its_share_and_the_rest_to_the_best() -> None:
    """A budget of 10: two for the layer, one for each of two module groups, and six for the best of all."""
    columns = {"layers.0.q_proj.weight": torch.arange(-10.0, 0.0).view(2, 5), "embed.weight": torch.ones(8, 5)}
    masks = sorted_masks(columns, MaskRule(0.2))
    assert masks["layers.0.q_proj.weight"].nonzero().tolist() == [[1, 2], [1, 3], [1, 4]]
    assert masks["embed.weight"].flatten().nonzero().flatten().tolist() == list(range(7))
    rows = sorted_masks(columns, MaskRule(0.2, "row", layer_quota=0.5))
    assert [mask.all(1).nonzero().flatten().tolist() for mask in rows.values()] == [[1], [0]]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--json"),
        (["--json", "no-such-directory/x.json"], "cannot be written"),
        (["--json", "x.json", "--layers", "0"], "0 is not a whole number of 1 or more"),
        (["--json", "x.json", "--granularity", "column"], "invalid choice"),
    ],
)
def test_a_bad_option_ends_in_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        mask_refresh.main(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert says in said
