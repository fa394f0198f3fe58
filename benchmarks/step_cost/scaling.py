"""How the cost of a step grows: one factor at a time around a base, with the exponent of the fit seconds = a x^b.

    python -m benchmarks.step_cost.scaling --json scaling.json [--factors tokens,width] [--repeats 5] [--quick]

Measured is the service's own step with the selection of the profile `thorough`, refresh of the target's gradient
included (`methods.ours`). The points of a factor are measured in turn, so that a busy machine slows all of them alike.

    candidates  samples N of a pool, of which 4 are selected
    tokens      T of every sample
    width       of the model's hidden states; everything else of a layer grows with it
    vocabulary  rows of the embedding and of the head
    survivors   samples that the filter keeps for K
    density     share of the weights that may move, under DualSFT's mask; the median leaves out its refresh

An exponent is what these values show: below a few hundred tokens or rows much of a step does not depend on any of them.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common.reporting import (
    OneLineParser,
    at_least_one,
    duration,
    names_of,
    say,
    table,
    writable_file,
    write_result,
)
from benchmarks.step_cost.workloads import REFRESH_STEPS, Workload
from stream_trainer.monitoring.allocator import keep_freed_memory

BASE = Workload("base", 4, 256, 704, heads=4, kv_heads=2, vocabulary=4096)
QUICK = Workload("quick", 2, 64, 176, heads=2, kv_heads=1, vocabulary=512, pool=8, batch_size=2, tokens=16, target=4)
HEAD_SIZE = 32


@dataclass(frozen=True)
class Point:
    """One thing to measure: a workload, and settings of the selection beyond it."""

    workload: Workload
    selection: Mapping[str, Any]


@dataclass(frozen=True)
class Factor:
    """What is varied, and the values of a full and of a quick run."""

    values: tuple[float, ...]
    quick: tuple[float, ...]
    point: Callable[[Workload, float], Point]


def _sized(field: str) -> Callable[[Workload, float], Point]:
    def point(base: Workload, value: float) -> Point:
        changes: dict[str, Any] = {field: int(value)}
        return Point(replace(base, **changes), {})

    return point


def _wide(base: Workload, width: float) -> Point:
    heads = int(width) // HEAD_SIZE
    grown = replace(base, hidden=int(width), intermediate=int(width * 2.75), heads=heads, kv_heads=heads // 2)
    return Point(grown, {})


def _surviving(base: Workload, survivors: float) -> Point:
    return Point(replace(base, keep_ratio=survivors / base.batch_size), {})


def _masked(base: Workload, density: float) -> Point:
    return Point(base, {"mask": "dual_sft", "dual_sft": {"density": density}})


FACTORS = {
    "candidates": Factor((8, 16, 32, 64), (4, 8), _sized("pool")),
    "tokens": Factor((32, 64, 128, 256, 512), (8, 16), _sized("tokens")),
    "width": Factor((128, 256, 384, 512), (64, 128), _wide),
    "vocabulary": Factor((1024, 4096, 16384, 32768), (512, 1024), _sized("vocabulary")),
    "survivors": Factor((4, 8, 16), (2, 4), _surviving),
    "density": Factor((0.01, 0.05, 0.2, 1.0), (0.05, 0.5), _masked),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; returns the exit code."""
    options = _parser().parse_args(arguments)
    import torch

    keep_freed_memory()  # as the service does
    torch.set_num_threads(options.threads)
    summary = []
    for i, name in enumerate(options.factors):
        label = f"{name} ({i + 1} of {len(options.factors)})"
        summary.append(measure(name, options.quick, options.repeats, label))
    base = QUICK if options.quick else BASE
    written = {
        "versions": {"torch": torch.__version__},
        "options": {"repeats": options.repeats, "threads": options.threads, "quick": options.quick},
        "base": asdict(base),
        "summary": summary,
    }
    write_result(options.json, written)
    print(report(summary))
    return 0


def measure(name: str, quick: bool, repeats: int, label: str) -> dict[str, Any]:
    """Median seconds of a step at each value of a factor, and the exponent."""
    from benchmarks.step_cost.methods.ours import Ours

    factor = FACTORS[name]
    values, base = (factor.quick, QUICK) if quick else (factor.values, BASE)
    methods = []
    for value in values:
        say(f"{label}: preparing {value:g}")
        point = factor.point(base, value)
        methods.append(Ours(point.workload, "cpu", **point.selection))
        methods[-1].warm_up()
    runs: list[list[float]] = [[] for _ in values]
    for round_number in range(repeats):
        for found, method in zip(runs, methods, strict=True):
            found.append(method.repetition()["seconds"])
        left = (repeats - round_number - 1) * sum(found[-1] for found in runs) * REFRESH_STEPS
        say(f"{label}: round {round_number + 1} of {repeats}, {duration(left)} left for this factor")
    seconds = [median(found) for found in runs]
    return {"factor": name, "values": values, "seconds": seconds, "exponent": exponent(values, seconds), "runs": runs}


def exponent(values: Sequence[float], seconds: Sequence[float]) -> float:
    """B of the fit `seconds = a * value^b`: least squares on the logarithms."""
    return float(np.polyfit(np.log(values), np.log(seconds), 1)[0])


def report(summary: Sequence[Mapping[str, Any]]) -> str:
    """What people read at the end."""
    rows = []
    for factor in summary:
        values = " ".join(f"{value:g}" for value in factor["values"])
        seconds = " ".join(f"{second:.3g}" for second in factor["seconds"])
        rows.append((factor["factor"], f"{factor['exponent']:.2f}", values, seconds))
    return table(("factor", "exponent", "values", "seconds a step"), rows)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m benchmarks.step_cost.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=writable_file, required=True, metavar="FILE", help="where the result is written")
    known = tuple(FACTORS)
    parser.add_argument(
        "--factors",
        type=partial(names_of, known=known),
        default=known,
        metavar="A,B",
        help=f"of {', '.join(known)} (all)",
    )
    parser.add_argument("--repeats", type=at_least_one, default=5, metavar="R", help="interleaved repetitions (5)")
    parser.add_argument("--threads", type=at_least_one, default=2, help="CPU threads (2)")
    parser.add_argument("--quick", action="store_true", help="two small values of each factor: does it run at all?")
    return parser


if __name__ == "__main__":
    sys.exit(main())
