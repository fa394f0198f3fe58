"""`stream-trainer select dual-sft`: which weights to train, and on which samples of a file.

The one-shot use of DualSFT (`gradient_selectors.mask`), in the order of the released code: a short warm-up on a
random share of the pool, which gives Adam's second moment as curvature; the target gradient; a self-distillation
gradient against the model before the warm-up, on a random 2 % of the pool; one pass over the pool for its mean
gradient, one for the score of each sample. The model itself is not written: training starts from the one given.

Written to `--out`, each file whole or not at all:

    mask.safetensors   a bool tensor for each trainable parameter by name, true where it may move
    subset.jsonl       the pool's own lines, best first
    scores.jsonl       `line`, `id`, `score` and `rank` of every sample, best first; a sample whose loss is not finite
                       has neither score nor rank
    rejected.jsonl     lines that are no samples, as dead letters
"""

import argparse
import copy
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from gradient_selectors.capture.batch import Batch
from gradient_selectors.capture.capture import GradientCapture, UnsupportedParameterError
from gradient_selectors.capture.gradients import Gradient, PoolGradients
from gradient_selectors.mask.dual_sft import Response, adam_curvature, column_scores, direction, row_scores
from gradient_selectors.mask.rule import MaskRule, choose_mask
from gradient_selectors.mask.self_distillation import prior_gradient
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from stream_trainer.checkpoints.manifest import sync
from stream_trainer.commands.options import add_common_options, not_negative, share, share_or_none
from stream_trainer.commands.pool_file import PoolFile, read_pool, size_of, writing
from stream_trainer.errors import SettingsError
from stream_trainer.models.loading import load_model
from stream_trainer.records import Sample
from stream_trainer.samples.collate import collate
from stream_trainer.samples.decoder import Decoder, read_samples
from stream_trainer.settings.schema import ModelSettings, SampleSettings
from stream_trainer.training.target import mean_gradient

BATCH = 16  # samples in one pass, and in one update of the warm-up
ANCHORS = 0.02  # share of the pool whose answers are to be kept
MAX_TARGET = 1024  # target samples used, from the top of the file


@dataclass(frozen=True)
class _Scorer:
    """What the passes over the pool work with.

    Attributes:
        advance: told of a phase, what was done of it since the last time, and how much there is in all.
    """

    args: argparse.Namespace
    capture: GradientCapture
    pool: PoolFile
    pad_id: int
    generator: torch.Generator
    advance: Callable[[str, int, int], None]

    def passes(self, phase: str, indices: Sequence[int]) -> Iterator[tuple[list[int], PoolGradients]]:
        """Gradients of some samples, batch by batch."""
        for start in range(0, len(indices), BATCH):
            members = list(indices[start : start + BATCH])
            yield members, self.capture.run(self.batch(members))
            self.advance(phase, len(members), len(indices))

    def batch(self, indices: Sequence[int]) -> Batch:
        return collate(self.pool.samples(indices), self.pad_id)

    def draw(self, share: float, among: Sequence[int]) -> list[int]:
        """A random share of some samples, at least one."""
        count = max(1, round(share * len(among)))
        return [among[i] for i in torch.randperm(len(among), generator=self.generator)[:count].tolist()]

    @property
    def by_length(self) -> list[int]:
        """The whole pool, similar lengths together so that little is padding."""
        return sorted(range(len(self.pool)), key=lambda index: self.pool.tokens[index])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_common_options(parser)
    parser.add_argument("--data", type=share, default=0.10, metavar="SHARE", help="of the pool to select (10%%)")
    parser.add_argument("--params", type=share, default=0.05, metavar="SHARE", help="of the weights to train (5%%)")
    parser.add_argument("--granularity", choices=("weight", "row"), default="weight", help="of the mask (weight)")
    parser.add_argument("--absolute", action="store_true", help="rank weights by magnitude, harmful ones too")
    parser.add_argument("--learning-rate", type=not_negative, default=2e-5, metavar="R", help="of the warm-up (2e-5)")
    parser.add_argument("--warm-up", type=share_or_none, default=0.10, metavar="SHARE", help="of the pool (10%%)")
    parser.add_argument("--lambda-prior", type=not_negative, default=0.2, metavar="W", help="weight of the prior (0.2)")


def run(args: argparse.Namespace) -> int:
    """Run the command with parsed options. Raises SettingsError, in one line, for whatever the user can mend."""
    pool_bytes = size_of(args.pool)
    model = ModelSettings(name=args.model, gguf_file=args.gguf_file, dtype=args.dtype, device=args.device)
    loaded = load_model(model, args.seed)
    decoder = Decoder(loaded.tokenizer, SampleSettings(max_tokens=args.max_tokens), loaded.max_positions)
    target = read_samples(args.target, decoder, MAX_TARGET, "--target")
    guards = args.lambda_prior > 0 and args.warm_up > 0  # without a warm-up the prior gradient is zero
    base = copy.deepcopy(loaded.model).requires_grad_(False) if guards else None
    try:
        capture = GradientCapture(loaded.model, loaded.autocast_dtype)
    except UnsupportedParameterError as error:
        raise SettingsError(f"--model={args.model}: {error}") from error
    with writing(args.out), _progress() as advance:
        args.out.mkdir(parents=True, exist_ok=True)
        pool = read_pool(
            args.pool, decoder, args.out / "rejected.jsonl", lambda count: advance("reading", count, pool_bytes)
        )
        generator = torch.Generator().manual_seed(args.seed)
        scorer = _Scorer(args, capture, pool, loaded.tokenizer.pad_token_id, generator, advance)
        mask, scores = _select(scorer, target, base)
        ranked = pool.write_scores(scores, args.out / "scores.jsonl")
        chosen = ranked[: max(1, round(args.data * len(pool)))]
        pool.write_lines(chosen, args.out / "subset.jsonl")
        _write_mask(mask, args)
    _report(args, pool, mask, len(ranked), len(chosen))
    return 0


def _select(scorer: _Scorer, target: Sequence[Sample], base: nn.Module | None) -> tuple[dict[str, Tensor], list[float]]:
    """The mask, and a score for each sample of the pool, NaN where its loss is not finite."""
    args, capture = scorer.args, scorer.capture
    curvature = adam_curvature(_warm_up(scorer), capture.parameters)
    mean, usable = _pool_gradient(scorer)
    new = mean_gradient(capture, target, scorer.pad_id)
    prior = None if base is None else _prior(scorer, base, usable)
    u = direction(Response(args.learning_rate, lambda_prior=args.lambda_prior), mean, new, prior, curvature)
    mask = choose_mask(column_scores(u, mean), MaskRule(args.params, args.granularity, args.absolute))
    scores = [math.nan] * len(scorer.pool)
    for members, gradients in scorer.passes("scoring samples", scorer.by_length):
        rows_N = torch.where(torch.isfinite(gradients.losses_N), row_scores(gradients, u), torch.nan)
        for index, score in zip(members, rows_N.tolist(), strict=True):
            scores[index] = score
    return mask, scores


def _warm_up(scorer: _Scorer) -> torch.optim.Optimizer:
    """Train on a random share of the pool, for the sake of the optimizer's second moment. Changes the model."""
    parameters = scorer.capture.parameters
    optimizer = torch.optim.AdamW(parameters.values(), lr=scorer.args.learning_rate, weight_decay=0.0)
    drawn = scorer.draw(scorer.args.warm_up, range(len(scorer.pool))) if scorer.args.warm_up else []
    for _, gradients in scorer.passes("warming up", drawn):
        finite_N = torch.isfinite(gradients.losses_N).float()
        for name in gradients.factors:
            parameters[name].grad = gradients.weighted_gradient_of(name, finite_N / finite_N.sum().clamp(min=1))
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def _pool_gradient(scorer: _Scorer) -> tuple[Gradient, list[int]]:
    """Mean gradient of the samples whose loss is finite, every trainable parameter in it, and which they are."""
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in scorer.capture.parameters.items()}
    usable: list[int] = []
    for members, gradients in scorer.passes("adding gradients", scorer.by_length):
        finite_N = torch.isfinite(gradients.losses_N)
        usable += [index for index, finite in zip(members, finite_N.tolist(), strict=True) if finite]
        for name in gradients.factors:
            total[name].add_(gradients.weighted_gradient_of(name, finite_N.float()))
    if not usable or not all(bool(values.isfinite().all()) for values in total.values()):
        raise SettingsError("the gradient of the pool is not finite; lower --learning-rate, or set --warm-up=0")
    return {name: values.div_(len(usable)) for name, values in total.items()}, usable


def _prior(scorer: _Scorer, base: nn.Module, usable: Sequence[int]) -> Gradient:
    anchors = scorer.draw(ANCHORS, usable)
    starts = range(0, len(anchors), BATCH)
    return prior_gradient(scorer.capture, base, (scorer.batch(anchors[start : start + BATCH]) for start in starts))


def _write_mask(mask: dict[str, Tensor], args: argparse.Namespace) -> None:
    path = args.out / "mask.safetensors"
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: values.cpu() for name, values in mask.items()}, temporary)
    sync(temporary)
    temporary.replace(path)


def _report(args: argparse.Namespace, pool: PoolFile, mask: dict[str, Tensor], ranked: int, chosen: int) -> None:
    kept, weights = sum(int(values.sum()) for values in mask.values()), sum(values.numel() for values in mask.values())
    print(f"kept {kept} of {weights} weights ({kept / weights:.1%}) in {args.out / 'mask.safetensors'}")
    print(f"kept {chosen} of {len(pool)} samples in {args.out / 'subset.jsonl'}, best first")
    if unusable := len(pool) - ranked:
        print(f"without a finite loss, and so without a score: {unusable} samples", file=sys.stderr)
    if pool.rejected:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(pool.rejected.items()))
        where = args.out / "rejected.jsonl"
        print(f"rejected {pool.rejected.total()} lines ({reasons}), kept in {where}", file=sys.stderr)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each phase on standard error, if that is a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def advance(phase: str, count: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.advance(tasks[phase], count)

        yield advance
