"""What a whole step costs, against plain training and against other ways to the same work.

    python -m benchmarks.step_cost --json step_cost.json [--workloads W1,W3] [--against plain_all,oracle] [--repeats 5]
        [--plot step_cost.svg]

Measured is the service's own step (`training.build.make_engine`, `training.step.train_step`): refresh of the target's
gradient, spread over the 8 steps that share it; scoring; quadratic program; update. Against it:

    plain_all  transformers' forward, mean loss, backward, fused AdamW, on all N candidates; scores nothing
    plain_k    the same on k samples, as many as a selection trains on
    oracle     gradients from autograd one sample at a time, written out; K, program and update on them
    vmap       the same with gradients from torch.func
    opacus     the same with gradients from opacus' GradSampleModule
    dattri     dattri-llm's DataSelectionCallback: drops half of the pool by plain inner products

Our step is measured by `--scoring`; with `exact` comes `top_k`, the same scores without redundancy and program. With
`sketched+cluster_ucb` all N candidates come in and leave at each step, but only the 3 in 8 that the bandit draws get a
gradient, as in a service that draws: less work than the others do, for what draws must find them.

Every method runs in a process of its own, so that its peak memory is its own; repetitions are interleaved, the others
waiting meanwhile. Before anything is timed, our scores, K and weighted gradient must equal autograd's to 1e-4, or
nothing is; a peer that disagrees is reported with its error. What cannot be measured is reported with the reason.

The processes of one workload are there at the same time and keep what they have once needed (W1: 3 to 5 GB, opacus 8,
vmap 13; W2: 5); name fewer in `--against` where memory is short. `--workloads tiny` is done in two minutes. Ratios are
of medians, ours over theirs: below 1 we are cheaper. The file is written anew after each workload. Exit codes: 0 done,
1 our own step is wrong or cannot be measured, 2 a mistake in the options.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from math import isfinite
from typing import Any

from benchmarks.common.plotting import need_matplotlib, svg_file
from benchmarks.common.reporting import (
    OneLineParser,
    at_least_one,
    names_of,
    say,
    table,
    writable_file,
    write_result,
)
from benchmarks.step_cost.agreement import Agreement, DisagreementError
from benchmarks.step_cost.interleaving import Options, Result, measure
from benchmarks.step_cost.methods import AGAINST, SCORINGS
from benchmarks.step_cost.plot import draw
from benchmarks.step_cost.processes import MissingError, start
from benchmarks.step_cost.workloads import DEFAULT_WORKLOADS, WORKLOADS, Workload
from stream_trainer.errors import SettingsError

DEFAULT_SCORINGS = ("exact", "sketched", "sketched+cluster_ucb")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; returns the exit code."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if parsed.device == "cuda" and not _has_gpu():
        parser.error("argument --device: torch sees no CUDA device; set it to cpu")
    options = Options(
        parsed.workloads,
        (
            *(SCORINGS[name] for name in parsed.scoring),
            *(("top_k",) if "exact" in parsed.scoring else ()),
        ),
        parsed.against,
        parsed.repeats,
        parsed.threads,
        parsed.device,
    )
    try:
        if parsed.plot is not None:
            need_matplotlib("--plot", parsed.plot)  # now rather than after an hour
        result = measure(options, start, lambda found: write_result(parsed.json, as_json(options, found)))
        print(report(options, result))
        if parsed.plot is not None:
            draw(summarise(options, result), parsed.plot, parsed.scoring[0])
    except (DisagreementError, MissingError) as error:
        say(f"error: {error}")
        return 1
    except SettingsError as error:
        say(f"error: {error}")
        return error.exit_code
    return 0


def summarise(options: Options, result: Result) -> list[dict[str, Any]]:
    """A row for each of our methods against each other one that was measured: ours over theirs."""
    runs = {(run["workload"], run["method"]): run for run in result.runs}
    rows = []
    for workload in options.workloads:
        for method in options.ours:
            for against in options.against:
                ours, theirs = runs.get((workload, method)), runs.get((workload, against))
                if ours is None or theirs is None:
                    continue
                rows.append(
                    {
                        "workload": workload,
                        "method": method,
                        "against": against,
                        "time_ratio": ours["median_s"] / theirs["median_s"],
                        "memory_ratio": ours["peak_bytes"] / theirs["peak_bytes"],
                    }
                )
    return rows


def as_json(options: Options, result: Result) -> dict[str, Any]:
    """Everything that was found and on what."""
    gpu = {} if options.device == "cpu" else {"gpu": _gpu_name()}
    return gpu | {
        "options": asdict(options),
        "versions": result.versions,
        "workloads": {name: _workload(WORKLOADS[name], options.device) for name in options.workloads},
        "agreement": [_agreement(agreement) for agreement in result.agreements],
        "summary": summarise(options, result),
        "missing": result.missing,
        "runs": result.runs,
    }


def _workload(workload: Workload, device: str) -> dict[str, Any]:
    import torch  # not needed before, and a matter of seconds

    from stream_trainer.models.loading import passes_in

    return asdict(workload) | {"passes": passes_in(workload.dtype, torch.device(device))}


def _agreement(agreement: Agreement) -> dict[str, Any]:
    errors = {name: error if isfinite(error) else None for name, error in agreement.errors.items()}
    return {**asdict(agreement), "errors": errors, "agrees": agreement.agrees}


def report(options: Options, result: Result) -> str:
    """What people read at the end."""
    seconds = [
        (run["workload"], run["method"], f"{run['median_s']:.3f}", f"{run['peak_bytes'] / 1e6:.0f}")
        for run in result.runs
    ]
    ratios = [
        (row["workload"], row["method"], row["against"], f"{row['time_ratio']:.2f}", f"{row['memory_ratio']:.2f}")
        for row in summarise(options, result)
    ]
    parts = [
        table(("workload", "method", "seconds a step", "peak MB"), seconds),
        table(("workload", "ours", "over", "time", "memory"), ratios),
    ]
    parts += [
        f"{agreement.workload}: {agreement.method} disagrees with autograd, relative errors {agreement.errors}"
        for agreement in result.agreements
        if not agreement.agrees
    ]
    parts += [f"{m['workload']}: {m['against']} was not measured: {m['reason']}" for m in result.missing]
    return "\n\n".join(parts)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m benchmarks.step_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=writable_file, required=True, metavar="FILE", help="where the result is written")
    parser.add_argument(
        "--plot",
        type=svg_file,
        metavar="FILE",
        help="write a picture there, as SVG, of the first way to score (needs the extra bench)",
    )
    for name, known, default in (
        ("--workloads", tuple(WORKLOADS), DEFAULT_WORKLOADS),
        ("--against", tuple(AGAINST), tuple(AGAINST)),
        ("--scoring", tuple(SCORINGS), DEFAULT_SCORINGS),
    ):
        parser.add_argument(
            name,
            type=partial(names_of, known=known),
            default=default,
            metavar="A,B",
            help=f"of {', '.join(known)} (default: {','.join(default)})",
        )
    parser.add_argument("--repeats", type=at_least_one, default=5, metavar="R", help="interleaved repetitions (5)")
    parser.add_argument("--threads", type=at_least_one, default=2, help="CPU threads of each method (2)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the models are (cpu)")
    return parser


def _has_gpu() -> bool:
    import torch  # not needed on the CPU, and a matter of seconds

    return torch.cuda.is_available()


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()


if __name__ == "__main__":
    sys.exit(main())
