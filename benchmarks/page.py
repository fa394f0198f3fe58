"""Make the page of benchmarks from the results: one table a question.

    python -m benchmarks.page --results benchmarks/results --out docs/benchmarks.md

DIR holds what the benchmarks wrote with `--json`. Nothing is measured, and the same files make the same page. A figure
is on the page only if a file in DIR holds it. Exit codes: 0 done, 2 a mistake in the options or a file that is no
result.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from textwrap import fill
from types import ModuleType
from typing import Any

from benchmarks.claims import section as claims
from benchmarks.common.reporting import OneLineParser, say, writable_file
from benchmarks.ingest import section as ingest
from benchmarks.learning.methods import REFERENCE
from benchmarks.learning.summary import Curve, case_of, ratio
from benchmarks.scale_out import section as scale_out
from benchmarks.telemetry import section as telemetry
from stream_trainer.errors import SettingsError, StreamTrainerError

Row = Sequence[str]

UNSTAMPED = "before 0.1.0"  # versions that did not write theirs into a result
NOTHING = "–"
OVER = "plain_all"
WIDTH = 120
PREAMBLE = """\
# Benchmarks

<!-- Made by `python -m benchmarks.page --results benchmarks/results --out docs/benchmarks.md`. Do not edit. -->

What Stream Trainer costs, and what it buys. Every benchmark drives the service itself, never a copy.

Methods are measured in turn, in one run on one machine. A busy machine slows all alike, so read ratios before seconds.
All figures are medians unless a table says otherwise.

The files are in `benchmarks/results/`. What was tried and what failed is in `benchmarks/LOG.md`.
"""


@dataclass(frozen=True)
class Result:
    """What one file holds."""

    name: str
    content: Mapping[str, Any]

    @property
    def origin(self) -> str:
        """Version, date, machine and conditions: results that share these share a table."""
        found = self.content
        stamped = f"version {found['version']}, {found['date'][:10]}" if "version" in found else UNSTAMPED
        conditions = {**found.get("options", {}), **found.get("environment", {}), **found}
        threads, dtype = conditions.get("threads"), conditions.get("dtype")
        parts = [
            stamped,
            self._machine(),
            f"{threads} thread{'s' if threads > 1 else ''}" if threads else "",
            dtype or "",
        ]
        return ", ".join(part for part in parts if part)

    def _machine(self) -> str:
        known = {**self.content, **self.content.get("environment", {}), **self.content.get("machine", {})}
        if known.get("gpu") is not None:
            return str(known["gpu"])
        if "cpu" not in known:
            return ""
        vectors, cores = known.get("vectors"), known.get("cores")
        return f"{known['cpu']}{f' ({vectors})' if vectors else ''}{f' with {cores} cores' if cores else ''}"


@dataclass(frozen=True)
class Question:
    """One section of the page.

    Attributes:
        answers: whether a result is of this question.
        body: the table of results that share an origin.
    """

    title: str
    text: str
    answers: Callable[[Mapping[str, Any]], bool]
    body: Callable[[Sequence[Result]], str]


def make_page(results: Iterable[Result]) -> str:
    """The whole page; the same for the same results. Raises SettingsError for a result of no question."""
    found: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result.name):
        found.setdefault(_question_of(result).title, []).append(result)
    sections = [_section(question, found[question.title]) for question in QUESTIONS if question.title in found]
    return "\n".join([PREAMBLE, *sections])


def _question_of(result: Result) -> Question:
    for question in QUESTIONS:
        if question.answers(result.content):
            return question
    raise SettingsError(f"{result.name} is not a result of a benchmark; remove it")


def _section(question: Question, results: Sequence[Result]) -> str:
    origins: dict[str, list[Result]] = {}
    for result in results:
        origins.setdefault(result.origin, []).append(result)
    parts = [f"## {question.title}", question.text.strip()]
    for origin, group in origins.items():
        names = ", ".join(f"`{result.name}`" for result in group)
        caption = f"{origin[0].upper()}{origin[1:]}: {names}."
        parts += [fill(caption, WIDTH, break_on_hyphens=False, break_long_words=False), question.body(group)]
    return "\n\n".join(parts) + "\n"


def _table(header: Row, rows: Iterable[Row]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _has_rows_of(*keys: str) -> Callable[[Mapping[str, Any]], bool]:
    """Whether the summary's rows have these keys."""
    return lambda content: bool(content.get("summary")) and all(set(keys) <= set(row) for row in content["summary"])


# What a step costs.

STEP_METHODS = {
    "plain_all": "plain AdamW on all",
    "plain_k": "plain AdamW on a quarter",
    "filter_then_weight/sketched+cluster_ucb": "sketched, bandit draws 3 in 8",
    "filter_then_weight/sketched": "sketched",
    "filter_then_weight/rank_one": "rank-one",
    "filter_then_weight/exact": "exact",
    "top_k": "top-k, exact",
    "dattri": "dattri-llm, drops half",
    "opacus": "Opacus",
    "vmap": "torch.func vmap",
    "oracle": "autograd, one by one",
}


def _step_costs(results: Sequence[Result]) -> str:
    """A row for each method, a column for each workload; a cell holds a figure of each file that has it."""
    workloads = {name: shape for result in results for name, shape in result.content["workloads"].items()}
    cells: dict[tuple[str, str], list[str]] = {}
    for result in results:
        runs = {(run["workload"], _current(run["method"])): run for run in result.content["runs"]}
        for (workload, method), run in runs.items():
            cells.setdefault((method, workload), []).append(_step_cell(run, runs.get((workload, OVER))))
    columns = sorted(workloads)
    methods = dict.fromkeys([*STEP_METHODS, *(method for method, _ in cells)])
    rows = [
        [STEP_METHODS.get(method, method), *("; ".join(cells.get((method, name), [])) or NOTHING for name in columns)]
        for method in methods
        if any((method, name) in cells for name in columns)
    ]
    shapes = "\n".join(_workload(name, workloads[name]) for name in columns)
    return f"{_table(['', *columns], rows)}\n\n{shapes}"


def _step_cell(run: Mapping[str, Any], plain: Mapping[str, Any] | None) -> str:
    if plain is None or plain is run:
        return f"{run['median_s']:.2f}"
    time, memory = (run[name] / plain[name] for name in ("median_s", "peak_bytes"))
    return f"{run['median_s']:.2f} (**{time:.2f}**, {memory:.2f})"


def _workload(name: str, shape: Mapping[str, Any]) -> str:
    adapters = f", LoRA of rank {shape['lora_rank']}" if shape["lora_rank"] else ""
    return (
        f"- {name}: {shape['layers']} layers of width {shape['hidden']}, vocabulary {shape['vocabulary']:,}, "
        f"{shape.get('passes', shape['dtype'])}{adapters}; {shape['pool']} samples of {shape['tokens']:,} tokens"
    )


def _current(name: str) -> str:
    """A name of today for one of before 0.1.0."""
    return re.sub(r"\bsketch\b", "sketched", name)


# How the cost grows.


def _scaling(results: Sequence[Result]) -> str:
    summary = [row for result in results for row in result.content["summary"]]
    rows = [
        [row["factor"], f"{row['exponent']:.2f}", _numbers(row["values"]), _numbers(row["seconds"])] for row in summary
    ]
    return _table(["factor", "b", "values", "seconds a step"], rows)


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" if value % 1 else f"{value:,.0f}" for value in values)


# What selection buys.


def _learning(results: Sequence[Result]) -> str:
    """A row for each stream and method of each file."""
    rows = [row for result in results for row in _learning_rows(result.content["curves"])]
    return _table(["stream", "method", "seeds", "samples", "seconds"], rows)


def _learning_rows(curves: Sequence[Curve]) -> list[Row]:
    references = {(*case_of(curve), curve["seed"]): curve for curve in curves if curve["method"] == REFERENCE}
    groups: dict[tuple[str, str], list[tuple[Curve, Curve]]] = {}
    for curve in curves:
        reference = references.get((*case_of(curve), curve["seed"]))
        if curve["method"] != REFERENCE and reference is not None:
            tier, stream, share = case_of(curve)
            where = f"{tier}, {stream}, {share} %", _current(curve["method"])
            groups.setdefault(where, []).append((curve, reference))
    return [
        [stream, f"`{method}`", str(len(pairs)), *(_spread(pairs, amount) for amount in ("trained", "seconds"))]
        for (stream, method), pairs in groups.items()
    ]


def _spread(pairs: Sequence[tuple[Curve, Curve]], amount: str) -> str:
    """The median of the seeds' ratios and their range; seeds whose reference learned nothing do not count."""
    found = [ratio(curve, reference, amount) for curve, reference in pairs]
    usable = sorted(value for value in found if not math.isnan(value))
    if not usable:
        return NOTHING
    middle = f"**{_ratio(median(usable))}**"
    return middle if usable[0] == usable[-1] else f"{middle} ({_ratio(usable[0])}-{_ratio(usable[-1])})"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "never"


# The smaller questions.


def _solver(results: Sequence[Result]) -> str:
    times = ("median_ms", "p95_ms")
    rows: list[Row] = []
    for result in results:
        found = {(row["candidates"], row["cap"] is not None): row for row in result.content["summary"]}
        rows += [
            [str(n), *(f"{found[n, capped][name]:.1f}" for capped in (False, True) for name in times)]
            for n in sorted({candidates for candidates, _ in found})
        ]
    return _table(["candidates", "median", "95th percentile", "capped: median", "95th percentile"], rows)


def _fidelity(results: Sequence[Result]) -> str:
    names = ("rank_correlation", "gram_error", "utility_lost", "utility_lost_rescaled")
    rows = []
    for result in results:
        for row in result.content["summary"]:
            scoring = _current(row.get("scoring") or row["mode"])
            if scoring != "exact":
                rows.append([str(row["step"]), scoring, *(f"{row[name]:.3f}" for name in names)])
    return _table(["updates", "scoring", "rank correlation", "error of K", "utility lost", "after line search"], rows)


def _all_rows(section: ModuleType) -> Callable[[Sequence[Result]], str]:
    """The rows that a benchmark makes of each of its results, as one table."""
    return lambda results: _table(section.HEADER, [row for result in results for row in section.rows(result.content)])


QUESTIONS = (
    Question(
        "What does a step cost?",
        """
`make bench-step-cost`: Filter-then-Weight on all candidates, with one refresh of the target's gradient in 8 steps.
Before anything is timed, scores and gradients are compared with those of autograd. Weights and tokens are random, so
what a bandit finds does not show here.

A cell holds seconds a step. In brackets are time and peak memory over plain AdamW's on all candidates; below 1 is
cheaper.
""",
        lambda content: {"runs", "workloads"} <= set(content),
        _step_costs,
    ),
    Question(
        "How does the cost of a step grow?",
        "`make bench-scaling`: one factor at a time, scored exactly; b is the exponent of `seconds = a x^b`.",
        _has_rows_of("factor", "exponent"),
        _scaling,
    ),
    Question(
        "What does selection buy?",
        """
`make bench-learning DATA=DIR`: what a method needs to reach the test loss that uniform selection ends with. The target
is grade-school mathematics (GSM8K, MIT); the rest of a stream is role-play and tool use (GPTeacher, Apache-2.0).

Cells are ratios to what uniform needs, with the range over seeds; below 1 is cheaper. `samples` are those trained on;
`seconds` count reading, drawing, refreshes, passes and updates. `real` is SmolLM2-135M, `qwen2` a small Qwen2. The
percentage is the target's share. Uniform trains on 4 of 16 samples; the others draw from 256 that wait, and read more
records for it. `nearest` and `near_random` draw without a gradient.
""",
        lambda content: "curves" in content,
        _learning,
    ),
    Question(
        "Does what the four papers claim show?",
        """
`make bench-claims DATA=DIR`: each claim in direction, at equal budgets, on a Qwen2 shape of 1.5 million parameters. The
papers' models are a thousand times as large. `yes`: ahead of every rival on every seed; `no`: behind one on every seed.
""",
        lambda content: "claims" in content,
        _all_rows(claims),
    ),
    Question(
        "How long does the quadratic program take?",
        "`make bench-solver`: milliseconds of one solve on one core, the fastest of three; a cap solves two programs.",
        _has_rows_of("candidates", "cap"),
        _solver,
    ),
    Question(
        "What do cheaper scorings cost the choice?",
        """
`make bench-fidelity DATA=DIR`: SmolLM2-135M after some updates, each scoring against the exact one. Figures are means
over pools of 16. The rank correlation is that of the utilities; K is the redundancy of the best 8.
""",
        _has_rows_of("rank_correlation", "gram_error"),
        _fidelity,
    ),
    Question(
        "How fast do records come in?",
        "`make bench-ingest`: records of 1 KB from a broker, 1 % of them malformed, on one core.",
        _has_rows_of("figure", "unit"),
        _all_rows(ingest),
    ),
    Question(
        "What do several processes gain?",
        """
`python -m benchmarks.scale_out --json FILE`: processes of one thread share 16 candidates. All but `plain`, which trains
on all, score them and train on one in four. What is sent, and memory, are over those of `plain`.
""",
        lambda content: "paper" in content,
        _all_rows(scale_out),
    ),
    Question(
        "What does watching cost?",
        "`make bench-telemetry`: share of a step's processor time for metrics, page, ledger, progress and logs.",
        lambda content: "telemetry" in content,
        _all_rows(telemetry),
    ),
)


def read_results(directory: Path) -> list[Result]:
    """What the files of a directory hold. Raises SettingsError if it cannot be read."""
    paths = sorted(directory.glob("*.json"))
    if not paths:
        raise SettingsError(f"--results {directory} holds no .json file; name the directory of the results")
    return [_read(path) for path in paths]


def _read(path: Path) -> Result:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read as JSON ({error}); remove it") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{path.name} is not a result of a benchmark; remove it")
    return Result(path.name, content)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the page as the command line says; returns the exit code."""
    parser = OneLineParser(
        "python -m benchmarks.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True, metavar="DIR", help="directory of the results")
    parser.add_argument("--out", type=writable_file, required=True, metavar="FILE", help="where to write the page")
    args = parser.parse_args(arguments)
    try:
        args.out.write_text(make_page(read_results(args.results)))
    except StreamTrainerError as error:
        say(f"error: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
