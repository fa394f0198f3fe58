"""What the papers behind the four methods claim, each in direction: one table.

    python -m benchmarks.claims --data DIR --json FILE [--claims weighing,gast] [--seeds 2] [--threads 1] [--quick]

    weighing     Filter-then-Weight against greedy and top-k under Adam, at an equal budget of samples
    dual_sft     mask and subset chosen together against one after the other: target gained, knowledge kept
    cluster_ucb  a fifth of the gradients against all of them
    gast         each layer draws its samples, against random layers and data-only selection, at equal budgets

DIR is that of `benchmarks.learning`. The model is that of its tier `qwen2`: 1.5 million parameters on bytes, which the
command first warms up; passes are float32 on any processor. The service makes every run. The module of a claim says
what its arms are, the module `table` when a direction shows. Nothing was tuned for a claim to show, and the papers'
models are a thousand times as large: what does not show here may show there.

Finished runs are kept in FILE's name with `.runs`, and skipped the next time; remove that directory after the code has
changed. `--quick`: a miniature of a few steps, which shows that the command works and nothing else.
Exit codes: 0 done, 2 a mistake in the options, 130 stopped.
"""

import argparse
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers

from benchmarks.claims import cluster_ucb, dual_sft, gast, weighing
from benchmarks.claims.runs import SHARE, StoppedError, kept
from benchmarks.claims.table import Figure, Values, report, summarise
from benchmarks.common.reporting import OneLineParser, at_least_one, names_of, say, writable_file, write_result
from benchmarks.learning.methods import REFERENCE
from benchmarks.learning.plan import QWEN2, Run, Tier, key
from benchmarks.learning.run import Bench, warm_up
from benchmarks.learning.streams import read_data
from stream_trainer.errors import StreamTrainerError
from stream_trainer.monitoring.logs import configure_logging
from stream_trainer.service import stopping_on_signals
from stream_trainer.settings.schema import LogSettings


@dataclass(frozen=True)
class Claim:
    """What a paper says, the figures that would show it, and what measures them on one seed."""

    says: str
    figures: Sequence[Figure]
    measure: Callable[[Bench, Tier, int], Values]


def _claim(module: ModuleType) -> Claim:
    return Claim(module.SAYS, module.FIGURES, module.measure)


CLAIMS = {
    "weighing": _claim(weighing),
    "dual_sft": _claim(dual_sft),
    "cluster_ucb": _claim(cluster_ucb),
    "gast": _claim(gast),
}
TIER = replace(QWEN2, model=QWEN2.model | {"dtype": "float32"})
SMALL = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
QUICK = replace(
    TIER,
    model=TIER.model | {"config": TIER.model["config"] | SMALL},
    warm_up_steps=4,
    max_tokens=64,
    prompt_chars=16,
    steps=4,
    every=2,
    target=8,
    test=8,
    retention=8,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the claims that the command line asks for; returns the exit code."""
    args = _parser().parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(args.threads)
    stop = threading.Event()
    try:
        with stopping_on_signals(stop):
            found = _measure(args, stop)
    except StreamTrainerError as error:
        say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    print(report(found))
    return 130 if stop.is_set() else 0


def _measure(args: argparse.Namespace, stop: threading.Event) -> list[dict[str, Any]]:
    """Summaries of all claims; FILE is written after each seed."""
    data = read_data(args.data)
    directory = args.json.with_suffix(".runs")
    directory.mkdir(exist_ok=True)
    tier = QUICK if args.quick else TIER
    done: dict[str, list[Values]] = {name: [] for name in args.claims}
    with (directory / "service.log").open("a") as log:
        configure_logging(LogSettings(level="WARNING"), log)
        bench = Bench(data, directory, args.threads, stop, lambda _: None)
        try:
            for name, seed in [(name, seed) for name in args.claims for seed in range(args.seeds)]:
                say(f"{name}, seed {seed}")
                done[name].append(_on_seed(bench, tier, name, seed))
                write_result(args.json, _result(bench, tier, args.seeds, done))
        except StoppedError:
            say("stopped; finished runs are kept, and the next call goes on from there")
    write_result(args.json, _result(bench, tier, args.seeds, done))
    return _summaries(done)


def _on_seed(bench: Bench, tier: Tier, name: str, seed: int) -> Values:
    """A claim's values, kept under a name that changes with all that they depend on but the code."""
    run = Run(tier, "mixture", SHARE, REFERENCE, seed)
    path = bench.directory / f"{name}-{key(run, bench.data.fingerprint, bench.threads)}"

    def make() -> Values:
        if not warm_up(bench, tier):
            raise StoppedError
        return CLAIMS[name].measure(bench, tier, seed)

    return kept(path, make)


def _result(bench: Bench, tier: Tier, seeds: int, done: dict[str, list[Values]]) -> dict[str, Any]:
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    settings = {"threads": bench.threads, "dtype": tier.model["dtype"], "data": bench.data.fingerprint}
    return {
        "claims": _summaries(done),
        "seeds_planned": seeds,
        "model": tier.model["config"],
        "steps": tier.steps,
        "environment": versions | settings,
    }


def _summaries(done: dict[str, list[Values]]) -> list[dict[str, Any]]:
    return [summarise(name, CLAIMS[name].says, CLAIMS[name].figures, seeds) for name, seeds in done.items() if seeds]


def _parser() -> OneLineParser:
    parser = OneLineParser(
        "python -m benchmarks.claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="directory of the data, as of benchmarks.learning")
    add("--json", type=writable_file, required=True, metavar="FILE", help="where to write the result")
    add("--claims", type=_names, default=tuple(CLAIMS), metavar="A,B", help=f"{', '.join(CLAIMS)} (all)")
    add("--seeds", type=at_least_one, default=2, metavar="N", help="repetitions (2)")
    add("--threads", type=at_least_one, default=1, metavar="N", help="threads of torch (1)")
    add("--quick", action="store_true", help="in miniature, see above")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return names_of(text, tuple(CLAIMS))


if __name__ == "__main__":
    sys.exit(main())
