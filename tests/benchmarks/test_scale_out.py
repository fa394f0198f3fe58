"""The benchmark of several ranks: that it does the right work and counts what is sent, never how fast it is."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_selectors.views.interaction import Interaction
from gradient_selectors.world.base import Alone, World

from benchmarks.scale_out import __main__ as scale_out
from benchmarks.scale_out import check, paper
from benchmarks.scale_out.measure import summarise
from benchmarks.scale_out.noted import Noted
from benchmarks.scale_out.plan import METHODS, REFRESH_STEPS, SHARE_KEPT, TINY, Setting, settings_of
from benchmarks.scale_out.steps import Rank
from benchmarks.step_cost.agreement import DisagreementError
from tests.gradient_selectors.world.threads import on_ranks, without_locks

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_tiny_form_reports_every_setting_and_method(tmp_path: Path) -> None:
    path = tmp_path / "scale_out.json"
    command = [sys.executable, "-m", "benchmarks.scale_out", "--json", str(path), "--tiny", "--repeats", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads(path.read_text())
    found = {(run["kind"], run["ranks"], run["pool"], run["method"]) for run in written["runs"]}
    pool = TINY.pool
    settings = {("one", 1, pool), ("strong", 2, pool), ("weak", 2, 2 * pool)}
    assert found == {(*setting, method) for setting in settings for method in METHODS}
    assert {(row["method"], row["ranks"]) for row in written["agreement"]} == {(m, w) for m in METHODS for w in (1, 2)}
    for run in written["runs"]:
        assert run["median_s"] > 0
        assert run["peak_bytes"] > 0
        assert (run["sent_bytes"] > 0) == (run["ranks"] > 1)
        assert (set(run["phases"]) == {"target", "score", "weigh", "update"}) == (run["method"] != "plain")
    plain = [run for run in written["runs"] if run["method"] == "plain" and run["ranks"] == 2]
    assert {run["sent_bytes"] for run in plain} == {4 * written["weights"]}  # 2 (W - 1) / W float32
    assert {row["model"] for row in written["paper"]} == set(paper.MODELS)
    assert "On paper, at 40 GB/s" in done.stdout


def test_two_ranks_make_the_steps_of_one_and_send_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(Interaction, monkeypatch)
    ranks = {size: [Rank(TINY, CPU, Alone()) for _ in range(size)] for size in (1, 2)}  # drawn one after the other

    def work(world: World, rank: Rank) -> tuple[dict[str, Any], dict[str, float]]:
        rank.world = Noted(world, lambda: None)
        found = {method: rank.answers(method, TINY.pool) for method in METHODS}
        rank.begin("plain", TINY.pool)
        before = world.sent["sum"]
        rank.step(TINY.pool)
        return found, {"plain": world.sent["sum"] - before}

    alone, _ = work(Alone(), ranks[1][0])
    (first, sent), (other, _) = on_ranks(2, lambda world: work(world, ranks[2][world.rank]))
    assert sent["plain"] == 4 * ranks[1][0].num_weights
    for method in METHODS:
        assert first[method][1] == other[method][1]  # weights, to the bit
        errors = check._errors(first[method][0], alone[method][0])
        assert errors["same_samples"]
        assert max(errors["coefficients"], errors["gradient"]) <= check.ALLOWED


def test_what_is_not_the_same_is_not_timed() -> None:
    own = {"coefficients_N": torch.tensor([0.5, 0.5, 0.0]), "a": torch.ones(3)}
    other = own | {"coefficients_N": torch.tensor([0.5, 0.0, 0.5])}
    for found in (other, own | {"a": torch.full((3,), 1.001)}):
        with pytest.raises(DisagreementError, match="exact on 2 ranks"):
            check._insist({"method": "exact", "ranks": 2, "allowed": 1e-5, **check._errors(found, own)})
    check._insist({"method": "exact", "ranks": 2, "allowed": 1e-5, **check._errors(own, own)})


def test_the_table_on_paper_is_made_of_measured_bytes() -> None:
    weights, ranks, kept = 1000, 2, 8
    sent = {"sum": 4000.0 * 1.25, "exchange": kept / ranks / 2 * 4000.0 / 32, "rows": 60.0, "control": 40.0}
    found = paper.measured(sent, weights, ranks, kept)
    assert found == {"sums": 1.25, "rows": 1 / 32, "told": 100.0}
    rows = {(row["model"], row["ranks"]): row for row in paper.on_paper({"sketch": found}, 1e9)}
    plain = 2 * 7 / 8 * 4 * paper.MODELS["7B"]
    row = rows["7B", 8]
    assert row["bytes"] == pytest.approx(1.25 * plain + 4 * 7 / 8 * 4 * paper.MODELS["7B"] / 32 + 700)
    assert row["seconds"] == pytest.approx(row["bytes"] / 1e9)
    assert rows["7B", 256]["over_plain"] < rows["7B", 64]["over_plain"]  # 256 survivors at most


def test_ratios_are_those_of_the_same_setting() -> None:
    def run(setting: Setting, method: str, seconds: float, sent: float) -> dict[str, Any]:
        known = {"kind": setting.kind, "ranks": setting.ranks, "pool": setting.pool, "method": method}
        return known | {"median_s": seconds, "sent_bytes": sent, "peak_bytes": 100 * seconds}

    one, strong, weak = settings_of(TINY, (1, 2))
    runs = [run(one, "plain", 1.0, 0), run(one, "sketch", 2.0, 0)]
    runs += [run(strong, "plain", 0.6, 100), run(strong, "sketch", 1.0, 130)]
    runs += [run(weak, "plain", 1.1, 100), run(weak, "sketch", 2.2, 140)]
    found = {(row["kind"], row["method"]): row for row in summarise(runs)}
    assert found["strong", "sketch"]["speedup"] == pytest.approx(2.0)
    assert found["weak", "sketch"]["speedup"] == pytest.approx(2 * 2.0 / 2.2)
    assert found["weak", "sketch"]["sent"] == pytest.approx(1.4)
    assert found["one", "sketch"]["sent"] is None
    assert found["strong", "sketch"]["time"] == pytest.approx(1 / 0.6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "2"], "put 1 into the list"),
        (["--ranks", "1,x"], "not a whole number"),
        (["--bandwidth", "0"], "not a number above 0"),
    ],
)
def test_mistakes_end_in_a_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        scale_out.main(["--json", str(tmp_path / "out.json"), *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_repetition_is_a_period_of_the_target() -> None:
    rank = Rank(TINY, CPU, Alone())
    rank.begin("sketch", TINY.pool)
    refreshed = []
    for _ in range(REFRESH_STEPS + 1):
        rank.step(TINY.pool)
        assert rank._engine is not None
        assert rank._engine.last is not None
        refreshed.append(rank._engine.last.target_refreshed)
    assert refreshed == [True, *[False] * (REFRESH_STEPS - 1), True]
    assert TINY.pool // SHARE_KEPT == rank._engine.selector.max_survivors  # type: ignore[union-attr]
