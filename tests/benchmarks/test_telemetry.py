"""The benchmark of watching: that it measures both sides of the same steps, and says all of it, never how much."""

import json
from pathlib import Path

import pytest

from benchmarks.telemetry import __main__ as telemetry
from benchmarks.telemetry.worker import MODELS

FACTORS = {"off": 1.0, "ledger": 1.02, "all": 1.01}


def turn_of(factor: float, *seconds: float) -> dict[str, list[float]]:
    return {"processor_s": [factor * step for step in seconds], "ledger_s": [0.004 * step for step in seconds]}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_writes_every_model_and_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "telemetry.json"
    assert telemetry.main(["--json", str(path), "--rounds", "1", "--scrapes", "2"]) == 0
    written = json.loads(path.read_text())
    assert set(written) == {"version", "date", "machine", "versions", "telemetry", "scrapes"}
    found = [(row["model"], row["variant"]) for row in written["telemetry"]]
    assert found == [(model, variant) for model in MODELS for variant in ("ledger", "all")]
    for row in written["telemetry"]:
        assert row["steps"] == telemetry.TURN_STEPS
        assert row["off_ms"] > 0
        assert row["share_low"] <= row["share_high"]
        assert ("own_share" in row) == (row["variant"] == "ledger")
    assert all(row["own_ms"] > 0 for row in written["telemetry"] if row["variant"] == "ledger")
    scrapes = written["scrapes"]
    assert scrapes["partitions"] == 100
    assert scrapes["bytes"] > 100 * 4 * 50
    assert 0 < scrapes["p50_ms"] <= scrapes["p95_ms"] <= scrapes["p99_ms"] <= scrapes["max_ms"]
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(found) + 1


def test_the_cost_is_that_of_the_same_steps() -> None:
    rounds = {name: [turn_of(factor, 0.1, 0.2), turn_of(factor, 0.4, 0.1)] for name, factor in FACTORS.items()}
    row = telemetry.summarise("all", rounds)
    assert row["steps"] == 4
    assert row["share_of_sums"] == pytest.approx(0.01)
    assert row["median_of_turns"] == pytest.approx(0.01)
    assert row["off_ms"] == pytest.approx(150)
    assert row["cost_ms"] == pytest.approx(1.5)
    assert row["share_low"] <= row["share"] <= row["share_high"]
    assert "own_share" not in row
    ledger = telemetry.summarise("ledger", rounds)
    assert ledger["own_ms"] == pytest.approx(0.8)  # the mean: of what a checkpoint costs, each step has its part
    assert ledger["own_share"] == pytest.approx(0.8 / 150)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--json"),
        (["--json", "no-such-directory/x.json"], "cannot be written"),
        (["--json", "x.json", "--rounds", "0"], "0 is not a whole number of 1 or more"),
    ],
)
def test_a_bad_option_ends_in_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        telemetry.main(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert says in said
