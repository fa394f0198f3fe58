"""Ranks that each have some rows of the model choose what one process chooses, and their rows make up its weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.engine import SelectionEngine
from gradient_selectors.mask.masked_adamw import MaskedAdamW
from gradient_selectors.views.sharded import require_rows
from gradient_selectors.world.base import Alone
from gradient_selectors.world.deal import spans_of

from tests.gradient_selectors.world.processes import run_to_end
from tests.gradient_selectors.world.test_ranks_agree import CASES, CLOSE, course
from tests.helpers.oracle import make_model

PROGRAM = "tests.gradient_selectors.world.sharded_program"
QUICK = ("full", "tied", "lora", "sketch_in_pieces", "mask", "plain")
REST = tuple(case for case in CASES if case not in QUICK)
PATIENCE_S = 250


def on_processes(size: int, folder: Path, cases: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    """What each rank says of each case."""
    run_to_end(PROGRAM, [str(folder), *cases], size, PATIENCE_S)
    return {case: [torch.load(folder / f"{case}.{rank}.pt") for rank in range(size)] for case in cases}


@pytest.mark.timeout(PATIENCE_S + 50)
@pytest.mark.parametrize(
    ("size", "cases"),
    [
        (2, QUICK),
        pytest.param(2, REST, marks=pytest.mark.slow),
        pytest.param(3, ("full", "lora", "sketch", "mask", "mask_of_rows", "plain"), marks=pytest.mark.slow),
    ],
)
def test_ranks_with_rows_choose_what_one_process_chooses(size: int, cases: tuple[str, ...], tmp_path: Path) -> None:
    found = on_processes(size, tmp_path, cases)
    for case, ranks in found.items():
        make, options = CASES[case]
        keeps_all = {name: value for name, value in options.items() if name != "factors_bytes"}
        alone, first = course(Alone(), make(), **keeps_all), ranks[0]
        assert first["chosen"] == alone.chosen, case
        for ours, wanted in zip(first["coefficients"], alone.coefficients, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=CLOSE, atol=CLOSE)
        for ours, wanted in zip(first["losses"], alone.losses, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=CLOSE, atol=CLOSE)
        assert first["mean"] == pytest.approx(alone.mean, rel=CLOSE)
        for name, weight in alone.weights.items():
            torch.testing.assert_close(first["weights"][name], weight, rtol=0, atol=CLOSE)
        assert first["moments"].keys() == alone.moments.keys()
        for key, values in alone.moments.items():  # with the mask itself, and who joined it when
            torch.testing.assert_close(first["moments"][key], values, rtol=CLOSE, atol=CLOSE)
        assert sum(rank["own"] for rank in ranks) == sum(w.numel() for w in first["weights"].values()), case
        assert max(rank["own"] for rank in ranks) < 0.6 * sum(rank["own"] for rank in ranks)
        assert first["calls"]
        runs_again(case, ranks, alone.chosen)
        for other in ranks[1:]:
            assert other["calls"] == first["calls"], case
            assert all(torch.equal(other["weights"][name], first["weights"][name]) for name in first["weights"])
            assert all(torch.equal(other["moments"][key], first["moments"][key]) for key in first["moments"])
    # What fails in a pass on one rank ends all: the others wait in the midst of theirs.
    told = [(tmp_path / f"{rank}.lost").read_text() for rank in range(size)]
    assert "rank 1 failed: ZeroDivisionError" in told[1]
    assert all(words != "nothing" for words in told)


def runs_again(case: str, ranks: list[dict[str, Any]], chosen: list[list[int]]) -> None:
    """Where factors are let go, the samples that all ranks run again are those that were chosen."""
    first, second, third = (sum(of_step) for of_step in zip(*(rank["again"] for rank in ranks), strict=True))
    if "factors_bytes" not in CASES[case][1]:
        assert (first, second, third) == (0, 0, 0)
    elif case == "few_let_go":
        assert (first, second, third) == (len(chosen[0]), 0, len(chosen[2]))
    elif case in ("sketch_in_pieces", "one_sample"):
        assert (first, third) == (len(chosen[0]), len(chosen[2]))
        assert second > len(chosen[1])  # two updates are compared beside
    else:
        assert min(first, second, third) > 0


def test_a_whole_model_is_left_as_it_is() -> None:
    model = make_model("llama")
    capture = GradientCapture(model)
    assert not capture.is_sharded
    masked: Any = MaskedAdamW(model.named_parameters(), lr=1e-3)
    require_rows(capture, masked)
    assert SelectionEngine(capture, masked, CASES["plain"][1]["weigh"]()).capture is capture


def test_rows_are_cut_as_torch_cuts_them() -> None:
    for size in (1, 2, 3, 5):
        for rows in (1, 2, 5, 7, 12):
            wanted = [len(part) for part in torch.arange(rows).chunk(size)]
            wanted += [0] * (size - len(wanted))
            assert [hi - lo for lo, hi in spans_of(size, rows)] == wanted
