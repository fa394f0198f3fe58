"""What a selecting step costs on one GPU, against plain training.

    python -m benchmarks.gpu --json gpu.json [--minutes 8] [--repeats 3]

Measured are the library's steps on Llama models with random weights, for samples of 512, 2,048 and 8,192 tokens, with
bfloat16 passes: 135M and 1B train all weights (held in float32), 7B_lora float32 adapters on a frozen bfloat16 base.
Activations are checkpointed for all methods alike where `checkpointing` says so. A step takes N = 16 candidates of 512
tokens, or N = 8 longer ones; k = 4 of them may enter its update:

    plain_all  transformers' forward and loss, backward, fused AdamW, on all N candidates; scores nothing
    plain_k    the same on k samples
    select     the engine: N scored by sketches, then Filter-then-Weight; 4 steps share a refresh of the target
    probe      the same on 8 candidates, with a refresh at each step
    equal      the engine's own plain step, on k samples

All are interleaved on one model and one optimizer; the first round is not counted. Memory is what torch allocated;
`over_rest` compares what a step takes beyond weights and moments. Phases come from a repetition of their own that waits
for the device at their borders; `synchronisations` are the places where the host waits for the GPU within a step.

Before anything is timed, the engine's update with equal coefficients must be plain autograd's, or nothing is. Cases go
from the cheapest to the dearest. What time or memory does not suffice for is left out, and the file says why. It is
written anew after each case. Needs torch and transformers, for LoRA also peft. `--device cpu --tiny` is a dry run. Exit
codes: 0 done, 1 the engine's update is wrong, 2 a mistake in the options.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.common.reporting import OneLineParser, at_least_one, say, writable_file, write_result
from benchmarks.gpu.shapes import SHAPES, TINY, TINY_SHAPES, TINY_TOKENS, TOKENS, Case, cases
from benchmarks.step_cost.agreement import DisagreementError

if TYPE_CHECKING:
    import torch


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; returns the exit code."""
    started = time.monotonic()
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        parser.error("argument --device: the models take hours on cpu; add --tiny for a dry run")

    import torch  # a matter of seconds, which mistakes and --help do not wait for

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch sees no CUDA device; set it to cpu, with --tiny")
    try:
        _run(options, torch.device(options.device), started + 60 * options.minutes)
    except DisagreementError as error:
        say(f"error: {error}")
        return 1
    return 0


def _run(options: argparse.Namespace, device: "torch.device", deadline: float) -> None:
    """Check, then time, and write what is found. Raises DisagreementError if the engine's update is wrong."""
    from benchmarks.gpu import report
    from benchmarks.gpu.check import check
    from benchmarks.gpu.measure import Budget, Result, measure

    small = Case(TINY, TINY_TOKENS[0])
    todo = cases(TINY_SHAPES, TINY_TOKENS) if options.tiny else cases(SHAPES, TOKENS)
    made_by = report.origin(device) | {
        "options": {name: getattr(options, name) for name in ("device", "tiny", "minutes", "repeats")},
        "agreement": check(small, device),
        "synchronisations": _synchronisations(small, device),
        "cases": [report.describe(case) for case in todo],
    }

    def as_json(found: Result) -> dict[str, Any]:
        return made_by | {"summary": report.summarise(found.runs), "missing": found.missing, "runs": found.runs}

    def keep(found: Result) -> None:
        write_result(options.json, as_json(found))

    print(report.text(as_json(measure(todo, device, Budget(deadline), options.repeats, keep))))


def _synchronisations(case: Case, device: "torch.device") -> dict[str, Any] | None:
    """Places and counts by method; None without a GPU, which nothing waits for."""
    from benchmarks.gpu.methods import METHODS, Bench
    from benchmarks.gpu.profiling import synchronisations

    if device.type != "cuda":
        return None
    bench = Bench(case, device)
    return {method.name: synchronisations(bench, method) for method in METHODS}


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser("python -m benchmarks.gpu", description=__doc__, formatter_class=form)
    parser.add_argument("--json", type=writable_file, required=True, metavar="FILE", help="where the result is written")
    parser.add_argument(
        "--minutes", type=at_least_one, default=8, metavar="M", help="what does not fit into so long is left out (8)"
    )
    parser.add_argument("--repeats", type=at_least_one, default=3, metavar="R", help="rounds at most, of each case (3)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where the models are (cuda)")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few tokens, to see whether it runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
