"""`stream-trainer select cluster-ucb`: the best few percent of a pool, for the gradients of a fifth of it.

The reward of a sample is the cosine between its gradient and the target set's mean gradient, at the model as it is
given: `<g_i, G> / (||g_i|| ||G||)`, exact over all trainable weights. The paper takes the cosine between the projected
*Adam direction* of a sample after a warm-up and the projected gradient of each target example, and of those the mean
within and the maximum over subtasks; there is one target set here, nothing has been trained yet, and nothing is
projected. Both divide by the gradient's length, without which short samples win. Clusters are those of mean input
embeddings; the paper's are of gradients, which costs one pass over the whole pool before the bandit saves any.

Written to `--out`, each file whole or not at all:

    subset.jsonl     the pool's own lines, best first
    scores.jsonl     `line`, `id`, `score` and `rank` of every sample that was scored, best first; a sample whose
                     gradient is not finite has neither score nor rank
    rejected.jsonl   lines that are no samples, as dead letters
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from gradient_selectors.capture.capture import GradientCapture, UnsupportedParameterError
from gradient_selectors.capture.gradients import Gradient
from gradient_selectors.draw.cluster_ucb_offline import OfflineOptions, Selection, select_offline
from gradient_selectors.draw.clusters import cosine_k_means
from gradient_selectors.preconditioner import plain
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from stream_trainer.commands.options import add_common_options, at_least, finite, share
from stream_trainer.commands.pool_file import PoolFile, read_pool, size_of, writing
from stream_trainer.errors import SettingsError
from stream_trainer.models.loading import LoadedModel, load_model
from stream_trainer.records import Sample
from stream_trainer.samples.collate import collate
from stream_trainer.samples.decoder import Decoder, read_samples
from stream_trainer.settings.schema import ModelSettings, SampleSettings
from stream_trainer.training.features import EmbeddingFeatures
from stream_trainer.training.target import mean_gradient

FEATURES_TOGETHER = 1024  # samples decoded at a time
SCORED_TOGETHER = 8  # samples in one pass, and draws between two looks at the rewards
SAMPLES_PER_CLUSTER = 200  # for the default number of clusters
MAX_CLUSTERS = 500
MAX_TARGET = 1024  # target samples used, from the top of the file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_common_options(parser)
    parser.add_argument("--budget", type=share, default=0.20, metavar="SHARE", help="of the pool to score (20%%)")
    parser.add_argument("--data", type=share, default=0.05, metavar="SHARE", help="of the pool to select (5%%)")
    parser.add_argument(
        "--clusters", type=at_least(1), metavar="K", help=f"arms (one per {SAMPLES_PER_CLUSTER} samples)"
    )
    parser.add_argument("--beta", type=finite, default=1.0, help="standard deviations above an arm's mean (1)")


def run(args: argparse.Namespace) -> int:
    """Run the command with parsed options. Raises SettingsError, in one line, for whatever the user can mend."""
    started = time.monotonic()
    if args.data > args.budget:
        raise SettingsError(f"--data={args.data:g} is more than --budget={args.budget:g}; raise --budget")
    pool_bytes = size_of(args.pool)
    loaded = load_model(
        ModelSettings(name=args.model, gguf_file=args.gguf_file, dtype=args.dtype, device=args.device), args.seed
    )
    capture = _attach(args, loaded)
    decoder = Decoder(loaded.tokenizer, SampleSettings(max_tokens=args.max_tokens), loaded.max_positions)
    pad_id = loaded.tokenizer.pad_token_id
    target = read_samples(args.target, decoder, MAX_TARGET, "--target")
    direction = _unit_gradient(mean_gradient(capture, target, pad_id))
    with writing(args.out), _progress() as bar:
        args.out.mkdir(parents=True, exist_ok=True)
        reading = bar.add_task("reading", total=pool_bytes)
        pool = read_pool(
            args.pool, decoder, args.out / "rejected.jsonl", lambda done: bar.update(reading, completed=done)
        )
        if math.floor(args.data * len(pool) + 1e-9) == 0:
            raise SettingsError(f"--data={args.data:g} of {len(pool)} samples is none; raise it")
        scoring = bar.add_task("scoring", total=math.floor(args.budget * len(pool) + 1e-9))

        def reward(indices_n: Tensor) -> Tensor:
            samples = pool.samples(indices_n.tolist())
            return _rewards(capture, direction, samples, pad_id, lambda count: bar.advance(scoring, count))

        generator = torch.Generator().manual_seed(args.seed)
        features_Nd = _features(pool, EmbeddingFeatures.of_model(loaded.model))
        num_clusters = args.clusters or min(MAX_CLUSTERS, max(2, len(pool) // SAMPLES_PER_CLUSTER))
        labels_N = cosine_k_means(features_Nd, num_clusters, generator).labels_N
        options = OfflineOptions(args.budget, args.data, args.beta, pulls=SCORED_TOGETHER)
        selection = select_offline(labels_N, reward, options, generator)
        scored = _part(pool, selection.drawn_n.tolist())
        scored.write_scores(selection.rewards_n.tolist(), args.out / "scores.jsonl")
        pool.write_lines(selection.chosen, args.out / "subset.jsonl")
    _report(args, pool, selection, time.monotonic() - started)
    return 0


def _attach(args: argparse.Namespace, loaded: LoadedModel) -> GradientCapture:
    try:
        return GradientCapture(loaded.model, loaded.autocast_dtype)
    except UnsupportedParameterError as error:
        raise SettingsError(f"--model={args.model}: {error}") from error


def _features(pool: PoolFile, features: EmbeddingFeatures) -> Tensor:
    starts = range(0, len(pool), FEATURES_TOGETHER)
    chunks = (range(start, min(start + FEATURES_TOGETHER, len(pool))) for start in starts)
    return torch.cat([features(pool.samples(chunk)) for chunk in chunks])


def _part(pool: PoolFile, indices: Sequence[int]) -> PoolFile:
    """Some of the pool's samples, in the order given."""
    return replace(
        pool,
        starts=[pool.starts[i] for i in indices],
        sizes=[pool.sizes[i] for i in indices],
        lines=[pool.lines[i] for i in indices],
        ids=[pool.ids[i] for i in indices],
        tokens=[pool.tokens[i] for i in indices],
    )


def _rewards(
    capture: GradientCapture, direction: Gradient, samples: Sequence[Sample], pad_id: int, done: Callable[[int], None]
) -> Tensor:
    """Cosine of each sample's gradient with the target's, (n,) float64; NaN where there is no gradient."""
    rewards_n = torch.empty(len(samples), dtype=torch.float64)
    by_length = sorted(range(len(samples)), key=lambda i: samples[i].num_tokens)
    for start in range(0, len(by_length), SCORED_TOGETHER):
        positions = by_length[start : start + SCORED_TOGETHER]
        gradients = capture.run(collate([samples[i] for i in positions], pad_id))
        dots_N = torch.stack(list(gradients.dots(direction).values())).sum(0).double()
        lengths_N = gradients.gram(range(len(positions)), plain).diagonal().sqrt()
        rewards_n[positions] = (dots_N / lengths_N).cpu()
        done(len(positions))
    return rewards_n


def _unit_gradient(gradient: Gradient) -> Gradient:
    length = math.sqrt(sum(float(values.double().square().sum()) for values in gradient.values()))
    if not (math.isfinite(length) and length > 0):
        raise SettingsError(f"--target: its gradient has length {length}; give samples the model can learn from")
    return {name: values / length for name, values in gradient.items()}


def _progress() -> Progress:
    """On a terminal only: a log is no place for bars."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )


def _report(args: argparse.Namespace, pool: PoolFile, selection: Selection, seconds: float) -> None:
    total, scored = len(pool), len(selection.drawn_n)
    print(f"scored {scored} of {total} samples ({scored / total:.1%}) in {seconds:.1f} s")
    print(f"kept {len(selection.chosen)} in {args.out / 'subset.jsonl'}, best first")
    if rejected := pool.rejected.total():
        print(f"rejected {rejected} lines that are no samples, kept in {args.out / 'rejected.jsonl'}")
    if unusable := int((~torch.isfinite(selection.rewards_n)).sum()):
        print(f"{unusable} of those scored have no usable gradient")
