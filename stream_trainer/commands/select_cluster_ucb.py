"""`stream-trainer select cluster-ucb`: the best few percent of a pool, for the gradients of a fifth of it.

The published, offline use of ClusterUCB, `gradient_selectors.select_cluster_ucb`. Written to `--out`, each file whole
or not at all:

    subset.jsonl     the pool's own lines, best first
    scores.jsonl     `line`, `id`, `score` and `rank` of every sample that was scored, best first; a sample whose
                     gradient is not finite has neither score nor rank
    rejected.jsonl   lines that are no samples, as dead letters
"""

import argparse
import math
import time

import torch
from gradient_selectors import UnsupportedParameterError, select_cluster_ucb
from gradient_selectors.offline import SAMPLES_PER_CLUSTER, ClusterUcbSelection

from stream_trainer.commands.options import add_common_options, at_least, finite, load_inputs, progress_bars, share
from stream_trainer.commands.pool_file import PoolFile, writing
from stream_trainer.errors import SettingsError


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
    inputs = load_inputs(args)
    with writing(args.out), progress_bars() as advance:
        pool = inputs.read_pool(args, advance)
        if math.floor(args.data * len(pool) + 1e-9) == 0:
            raise SettingsError(f"--data={args.data:g} of {len(pool)} samples is none; raise it")
        try:
            found = select_cluster_ucb(
                inputs.loaded.model,
                pool,
                [inputs.target],
                budget=args.budget,
                share=args.data,
                clusters=args.clusters,
                beta=args.beta,
                autocast=inputs.loaded.autocast_dtype,
                generator=torch.Generator().manual_seed(args.seed),
                progress=advance,
            )
        except UnsupportedParameterError as error:
            raise SettingsError(f"--model={args.model}: {error}") from error
        except ValueError as error:
            raise SettingsError(f"--target={args.target}: {error}") from error
        pool.write_scores(found.drawn_n.tolist(), found.scores_n.tolist(), args.out / "scores.jsonl")
        pool.write_lines(found.selected, args.out / "subset.jsonl")
    _report(args, pool, found, time.monotonic() - started)
    return 0


def _report(args: argparse.Namespace, pool: PoolFile, found: ClusterUcbSelection, seconds: float) -> None:
    total, scored = len(pool), len(found.drawn_n)
    print(f"scored {scored} of {total} samples ({scored / total:.1%}) in {seconds:.1f} s")
    print(f"kept {len(found.selected)} in {args.out / 'subset.jsonl'}, best first")
    if rejected := pool.rejected.total():
        where = args.out / "rejected.jsonl"
        print(f"rejected {rejected} lines that are no samples ({pool.reasons}), kept in {where}")
    if unusable := int((~torch.isfinite(found.scores_n)).sum()):
        print(f"{unusable} of those scored have no usable gradient")
