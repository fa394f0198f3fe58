"""`stream-trainer select dual-sft`: which parameters to train, and on which samples of a file.

The one-shot use of DualSFT, `gradient_selectors.select_dual_sft`. The model itself is not written: training starts from
the one given. Written to `--out`, each file whole or not at all:

    mask.safetensors   a bool tensor for each trainable parameter by name, true where it may move
    subset.jsonl       the pool's own lines, best first
    scores.jsonl       `line`, `id`, `score` and `rank` of every sample, best first; a sample whose loss is not finite
                       has neither score nor rank
    rejected.jsonl     lines that are no samples, as dead letters
"""

import argparse
import sys

import torch
from gradient_selectors import MaskRule, UnsupportedParameterError, select_dual_sft
from safetensors.torch import save
from torch import Tensor

from stream_trainer.commands.options import (
    add_common_options,
    load_inputs,
    not_negative,
    progress_bars,
    share,
    share_or_none,
)
from stream_trainer.commands.pool_file import PoolFile, replacing, writing
from stream_trainer.errors import SettingsError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_common_options(parser)
    parser.add_argument("--data", type=share, default=0.10, metavar="SHARE", help="of the pool to select (10%%)")
    parser.add_argument("--params", type=share, default=0.05, metavar="SHARE", help="of the parameters to train (5%%)")
    parser.add_argument("--granularity", choices=("weight", "row"), default="weight", help="of the mask (weight)")
    parser.add_argument("--absolute", action="store_true", help="rank by magnitude, harmful ones too")
    parser.add_argument("--learning-rate", type=not_negative, default=2e-5, metavar="R", help="of the warm-up (2e-5)")
    parser.add_argument("--warm-up", type=share_or_none, default=0.10, metavar="SHARE", help="of the pool (10%%)")
    parser.add_argument("--lambda-prior", type=not_negative, default=0.2, metavar="W", help="weight of the prior (0.2)")


def run(args: argparse.Namespace) -> int:
    """Run the command with parsed options. Raises SettingsError, in one line, for whatever the user can mend."""
    inputs = load_inputs(args)
    with writing(args.out), progress_bars() as advance, inputs.pool(args, advance) as pool:
        try:
            found = select_dual_sft(
                inputs.loaded.model,
                pool,
                [inputs.target],
                share=args.data,
                rule=MaskRule(args.params, args.granularity, args.absolute),
                learning_rate=args.learning_rate,
                warm_up=args.warm_up,
                lambda_prior=args.lambda_prior,
                autocast=inputs.loaded.autocast_dtype,
                generator=torch.Generator().manual_seed(args.seed),
                progress=advance,
            )
        except UnsupportedParameterError as error:
            raise SettingsError(f"--model={args.model}: {error}") from error
        except ValueError as error:
            raise SettingsError(f"{error}: --learning-rate, --warm-up=0") from error
        ranked = pool.write_scores(range(len(pool)), found.scores_N.tolist(), args.out / "scores.jsonl")
        pool.write_lines(found.selected, args.out / "subset.jsonl")
        _write_mask(found.mask, args)
    _report(args, pool, found.mask, ranked, len(found.selected))
    return 0


def _write_mask(mask: dict[str, Tensor], args: argparse.Namespace) -> None:
    with replacing(args.out / "mask.safetensors") as out:
        out.write(save({name: values.cpu() for name, values in mask.items()}))


def _report(args: argparse.Namespace, pool: PoolFile, mask: dict[str, Tensor], ranked: int, chosen: int) -> None:
    kept, total = sum(int(values.sum()) for values in mask.values()), sum(values.numel() for values in mask.values())
    print(f"kept {kept} of {total} parameters ({kept / total:.1%}) in {args.out / 'mask.safetensors'}")
    print(f"kept {chosen} of {len(pool)} samples in {args.out / 'subset.jsonl'}, best first")
    if unusable := len(pool) - ranked:
        print(f"without a finite loss, and so without a score: {unusable} samples", file=sys.stderr)
    if pool.rejected:
        print(f"{pool.rejections}, kept in {args.out / 'rejected.jsonl'}", file=sys.stderr)
