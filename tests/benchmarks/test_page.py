"""The page of benchmarks: it is what the results say, it is short, and what it cannot read is named."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import page
from benchmarks.claims.table import Figure, Values, summarise
from benchmarks.page import Result, make_page, read_results

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
MOST_WORDS, MOST_IN_SENTENCE = 900, 25
STAMP = {"version": "0.2.0", "date": "2027-01-02T03:04:05+00:00", "machine": {"cpu": "Some CPU", "cores": 8}}


def words(text: str) -> list[str]:
    """Whatever has a letter or a digit: no lines of tables, no dashes."""
    return [word for word in text.split() if any(character.isalnum() for character in word)]


def test_the_page_is_what_the_command_makes_of_the_results() -> None:
    made = make_page(read_results(ROOT / "benchmarks" / "results"))
    assert PAGE.read_text() == made, (
        "run python -m benchmarks.page --results benchmarks/results --out docs/benchmarks.md"
    )


def test_the_page_is_short_and_so_are_its_sentences() -> None:
    text = PAGE.read_text()
    assert len(words(text)) < MOST_WORDS
    prose = [block for block in text.split("\n\n") if block[0] not in "|-#<"]
    for sentence in re.split(r"(?<=[.;:])\s+", "\n".join(prose)):
        assert len(words(sentence)) <= MOST_IN_SENTENCE, sentence


def step_cost(runs: dict[tuple[str, str], tuple[float, int]], **others: Any) -> dict[str, Any]:
    shape = {"layers": 12, "hidden": 576, "vocabulary": 8192, "dtype": "bfloat16", "lora_rank": None}
    shape |= {"pool": 16, "tokens": 128, "passes": "float32"}
    return {
        "options": {"threads": 2},
        "workloads": {workload: shape for workload, _ in runs},
        "runs": [
            {"workload": workload, "method": method, "median_s": seconds, "peak_bytes": size}
            for (workload, method), (seconds, size) in runs.items()
        ],
        "summary": [],
        **others,
    }


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_step_costs_are_seconds_with_ratios_to_plain_training_of_the_same_file() -> None:
    first = step_cost({("W1", "plain_all"): (4.0, 200), ("W1", "filter_then_weight/sketch"): (3.0, 300)})
    second = step_cost({("W1", "plain_all"): (8.0, 200), ("W2", "filter_then_weight/sketched"): (1.0, 100)})
    text = make_page([Result("2.json", second), Result("1.json", first)])
    assert rows_of(text) == [
        ["", "W1", "W2"],
        ["---", "---", "---"],
        ["plain AdamW on all", "4.00; 8.00", "–"],
        ["sketched", "3.00 (**0.75**, 1.50)", "1.00"],
    ]
    assert "Before 0.1.0, 2 threads: `1.json`, `2.json`." in text
    assert "- W1: 12 layers of width 576, vocabulary 8,192, float32; 16 samples of 128 tokens" in text


def test_results_of_another_version_or_machine_have_a_table_of_their_own() -> None:
    old, new = step_cost({("W1", "plain_all"): (4.0, 2)}), step_cost({("W1", "plain_all"): (5.0, 2)}, **STAMP)
    graphic = step_cost({("W1", "plain_all"): (1.0, 2)}, **STAMP, gpu="Some GPU")
    text = make_page([Result("a.json", old), Result("b.json", new), Result("c.json", graphic)])
    assert "Version 0.2.0, 2027-01-02, Some CPU with 8 cores, 2 threads: `b.json`." in text
    assert "Version 0.2.0, 2027-01-02, Some GPU, 2 threads: `c.json`." in text
    assert [row[1] for row in rows_of(text) if row[0].startswith("plain")] == ["4.00", "5.00", "1.00"]


def curve(method: str, seed: int, losses: Sequence[float]) -> dict[str, Any]:
    points = [{"trained": 4 * i, "seconds": 2.0 * i, "test": loss} for i, loss in enumerate(losses)]
    where = {"tier": "real", "stream": "mixture", "target_share": 25}
    return {**where, "method": method, "seed": seed, "points": points}


def test_learning_is_ratios_to_uniform_with_their_range() -> None:
    curves = [curve("uniform", seed, [3.0, 2.5, 2.0]) for seed in range(3)]
    curves += [curve("thrifty", seed, losses) for seed, losses in enumerate(([3.0, 2.0], [3.0, 1.0], [3.0, 2.9]))]
    curves.append(curve("filter_then_weight+sketch", 0, [3.0, 2.0]))
    text = make_page(
        [Result("x.json", {"curves": curves, "environment": {"cpu": "C", "threads": 1, "dtype": "float32"}})]
    )
    assert rows_of(text)[2:] == [
        ["real, mixture, 25 %", "`thrifty`", "3", "**0.50** (0.25-never)", "**0.50** (0.25-never)"],
        ["real, mixture, 25 %", "`filter_then_weight+sketched`", "1", "**0.50**", "**0.50**"],
    ]
    assert "Before 0.1.0, C, 1 thread, float32: `x.json`." in text


def test_a_method_that_never_gets_there_is_said_to() -> None:
    curves = [curve("uniform", 0, [3.0, 2.0]), curve("top_k", 0, [3.0, 2.9])]
    assert rows_of(make_page([Result("x.json", {"curves": curves})]))[2][3:] == ["**never**", "**never**"]
    nothing = [curve("uniform", 0, [3.0, 3.5]), curve("top_k", 0, [3.0, 2.0])]
    assert rows_of(make_page([Result("x.json", {"curves": nothing})]))[2][3:] == ["–", "–"]


def test_every_other_question_has_its_table() -> None:
    times = {"median_ms": 1.0, "p95_ms": 2.0}
    fidelity = {"rank_correlation": 0.9, "gram_error": 0.1, "utility_lost": 0.02, "utility_lost_rescaled": 0.01}
    results = {
        "solver": [{"candidates": 8, "cap": cap, **times} for cap in (None, 1.0)],
        "fidelity": [{"step": 8, "mode": mode, **fidelity} for mode in ("exact", "sketch 16")],
        "ingest": [{"figure": "poll", "value": 1234.5, "unit": "records/s"}],
        "scaling": [{"factor": "tokens", "exponent": 0.9, "values": [32, 64], "seconds": [0.16, 0.27]}],
    }
    text = make_page(Result(f"{name}.json", {"summary": rows, **STAMP}) for name, rows in results.items())
    rows = rows_of(text)
    assert ["8", "1.0", "2.0", "1.0", "2.0"] in rows
    assert ["8", "sketched 16", "0.900", "0.100", "0.020", "0.010"] in rows
    assert ["reading, records a second", "1,234"] in rows
    assert ["tokens", "0.90", "32, 64", "0.16, 0.27"] in rows
    assert sum(line.startswith("## ") for line in text.splitlines()) == 4


def test_a_claim_is_shown_beside_its_best_rival() -> None:
    figures = [
        Figure("loss", "ours", ("theirs", "others"), shown=("uniform",)),
        Figure("share", "ours", ("theirs",), higher=True),
    ]
    loss = {"ours": 1.8, "theirs": 1.95, "others": 1.9, "uniform": 1.7}
    seeds: list[Values] = [{"loss": loss, "share": {"ours": 0.5, "theirs": share}} for share in (0.75, None)]
    rows = rows_of(make_page([Result("x.json", {"claims": [summarise("weighing", "says", figures, seeds)]})]))
    assert rows[2:] == [
        ["`weighing`", "loss, lower is better", "1.800", "`others` 1.900", "yes, 2 seeds"],
        ["`weighing`", "share, higher is better", "0.500", "`theirs` never", "within noise, 2 seeds"],
    ]


def test_a_group_of_processes_is_shown_with_what_it_gains() -> None:
    known = {"kind": "strong", "ranks": 2, "method": "sketch"}
    runs = [known | {"median_s": 1.5}, {"kind": "one", "ranks": 1, "method": "sketch", "median_s": 2.4}]
    rows = [known | {"speedup": 1.6, "sent": None, "peak": 1.25}, known | {"kind": "weak"}]
    machine = {"cpu": "a processor", "vectors": "AVX2", "cores": 2}
    content = {"paper": [], "runs": runs, "summary": rows, "gpu": None, "machine": machine}
    text = make_page([Result("x.json", content)])
    assert rows_of(text)[2:] == [["2", "sketch", "2.40", "1.50", "1.60", "-", "1.25"]]
    assert "a processor (AVX2) with 2 cores" in text


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(step_cost({("W1", "plain_all"): (4.0, 2)})))
    assert page.main([f"--results={tmp_path}", f"--out={tmp_path / 'page.md'}"]) == 0
    assert (tmp_path / "page.md").read_text().startswith("# Benchmarks\n")


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"summary": [{"figure": "poll"}]}'])
def test_what_is_no_result_is_named(content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "odd.json").write_text(content)
    assert page.main([f"--results={tmp_path}", f"--out={tmp_path / 'page.md'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert ("odd.json" if content is not None else str(tmp_path)) in line
    assert not (tmp_path / "page.md").exists()
