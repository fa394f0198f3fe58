"""What a step costs on several processes, against one, and what they send each other.

    python -m benchmarks.scale_out --json scale_out.json [--ranks 1,2] [--minutes 8] [--repeats 5] [--bandwidth 40]

Groups of one and of more processes, one thread each, hold the same Llama with random weights and make the library's
steps in turn, so that a busy machine slows all alike. A repetition has 4 steps: those that share a refresh of the
target.

    plain   forward, backward, all-reduce of the gradient, fused AdamW, on all candidates; scores nothing
    sketch  the engine with `Sketched`, then Filter-then-Weight: one candidate in 4 enters the update
    exact   the same with `Exact`

`one` is a group of one; `strong` the same pool on more ranks, `weak` a pool that grows with them. `speedup` is by how
much more candidates a second there are than on one rank; the other ratios are over `plain` in the same setting. Bytes
are counted at the calls of the ranks, per step and rank, a refresh of the target's share among them. Seconds by phase,
and of the calls, come from a first round that counts in nothing else; memory, the peak of a rank's process, from groups
of their own.

Before anything is timed, all groups must choose the same samples of a pool with the same coefficients and gradient, and
the ranks of a group must agree to the bit; or nothing is. At the end stands a table on paper: what a step would send on
models and groups that are not at hand, from the measured bytes and a bandwidth that --bandwidth states.

`--device cuda` takes a GPU for each rank, NCCL and a larger model; it leaves out groups that the GPUs do not suffice
for. Every rank holds the whole model. `--tiny` is a short form, to see whether it runs. Exit codes: 0 done, 1 the
groups do not compute the same or a rank has failed, 2 a mistake in the options.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common.reporting import OneLineParser, at_least_one, say, table, writable_file, write_result
from benchmarks.scale_out import paper
from benchmarks.scale_out.groups import LostError
from benchmarks.scale_out.plan import ON_GPU, SMALL, TINY, Workload
from benchmarks.step_cost.agreement import DisagreementError


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; returns the exit code."""
    started = time.monotonic()
    parser = _parser()
    options = parser.parse_args(arguments)
    if 1 not in options.ranks:
        parser.error("argument --ranks: all are compared with one rank; put 1 into the list")
    missing = _missing(parser, options)
    ranks = [size for size in options.ranks if size not in missing]
    workload = TINY if options.tiny else SMALL if options.device == "cpu" else ON_GPU
    try:
        result = _measure(options, workload, ranks, started + 60 * options.minutes)
    except (DisagreementError, LostError) as error:
        say(f"error: {error}")
        return 1
    result["missing"] = [{"ranks": size, "reason": reason} for size, reason in missing.items()]
    write_result(options.json, result)
    print(text(result))
    return 0


def _measure(options: argparse.Namespace, workload: Workload, ranks: Sequence[int], deadline: float) -> dict[str, Any]:
    import torch

    from benchmarks.gpu.report import origin  # torch takes seconds, which mistakes and --help do not wait for
    from benchmarks.scale_out.measure import measure, summarise

    found = measure(workload, ranks, options.device, options.repeats, deadline)
    largest = [run for run in found.runs if run["kind"] == "weak" and run["ranks"] == max(ranks)]
    measured = {run["method"]: run["measured"] for run in largest}
    return {
        **origin(torch.device(options.device)),
        "passes": "float32",
        "options": {name: getattr(options, name) for name in ("device", "tiny", "repeats", "bandwidth")},
        "threads": 1,
        "weights": found.weights,
        "tokens": workload.tokens,
        "agreement": found.agreement,
        "summary": summarise(found.runs),
        "paper": paper.on_paper(measured, options.bandwidth * 1e9),
        "runs": found.runs,
    }


def _missing(parser: OneLineParser, options: argparse.Namespace) -> dict[int, str]:
    """Groups that cannot be here, with the reason."""
    if options.device == "cpu":
        return {}
    import torch

    count = torch.cuda.device_count()
    if not count:
        parser.error("argument --device: torch sees no CUDA device; set it to cpu")
    return {size: f"each rank needs a GPU, and there are {count}" for size in options.ranks if size > count}


def text(result: Mapping[str, Any]) -> str:
    """What people read at the end, in Markdown."""
    runs = [
        (
            *(f"{run['kind']}", f"{run['ranks']}", run["method"], f"{run['pool']}", f"{run['median_s']:.3f}"),
            *(f"{run['sent_bytes'] / 1e6:.1f}", _shown(run["peak_bytes"], 1e6, 0)),
        )
        for run in result["runs"]
    ]
    ratios = [
        (row["kind"], f"{row['ranks']}", row["method"], *(_shown(row[name]) for name in RATIOS))
        for row in result["summary"]
    ]
    phases = [
        (run["kind"], f"{run['ranks']}", run["method"], _seconds(run["phases"]), _seconds(run["exchange"]))
        for run in result["runs"]
    ]
    parts = [
        table(("setting", "ranks", "method", "pool", "seconds a step", "MB sent a rank", "peak MB a rank"), runs),
        table(("setting", "ranks", "method", "speedup", "time", "sent", "peak"), ratios),
        table(("setting", "ranks", "method", "seconds by phase", "of these in calls of the ranks"), phases),
    ]
    if result["paper"]:
        header = ("model", "ranks", "method", "GB sent a rank", "over plain", "seconds", "GB a rank at rest")
        parts.append(
            f"On paper, at {result['options']['bandwidth']:g} GB/s:\n\n" + table(header, paper.lines(result["paper"]))
        )
    parts += [f"{row['ranks']} ranks were left out: {row['reason']}" for row in result["missing"]]
    return "\n\n".join(parts)


RATIOS = ("speedup", "time", "sent", "peak")


def _seconds(found: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in found.items()) or "-"


def _shown(value: float | None, unit: float = 1.0, digits: int = 2) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"


def _ranks(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(at_least_one(part) for part in text.split(",")))


def _bandwidth(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def _parser() -> OneLineParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser("python -m benchmarks.scale_out", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--json", type=writable_file, required=True, metavar="FILE", help="where the result is written")
    add("--ranks", type=_ranks, default=(1, 2), metavar="W,...", help="processes of each group (1,2)")
    add("--minutes", type=at_least_one, default=8, metavar="M", help="no round begins that would not end in time (8)")
    add("--repeats", type=at_least_one, default=5, metavar="R", help="rounds at most (5)")
    add("--bandwidth", type=_bandwidth, default=40.0, metavar="GB/S", help="that a rank sends at, on paper (40)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where the models are: gloo or NCCL (cpu)")
    add("--tiny", action="store_true", help="a tiny model and few tokens, to see whether it runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
