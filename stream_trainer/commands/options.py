"""What the offline selections share: options and the types of their values, what they read, and progress."""

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gradient_selectors import Batch
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

from stream_trainer.commands.pool_file import PoolFile, read_pool, size_of
from stream_trainer.models.loading import LoadedModel, load_model
from stream_trainer.samples.collate import collate
from stream_trainer.samples.decoder import Decoder, read_samples
from stream_trainer.settings.numbers import at_least
from stream_trainer.settings.schema import ModelSettings, SampleSettings

MAX_TARGET = 1024  # target samples used, from the top of the file

Advance = Callable[[str, int, int], None]
"""Told of a phase, what was done of it since the last time, and how much there is in all."""


@dataclass(frozen=True)
class Inputs:
    """What a selection works on: a model, and the target as one batch."""

    loaded: LoadedModel
    decoder: Decoder
    target: Batch
    pool_bytes: int

    def read_pool(self, args: argparse.Namespace, advance: Advance) -> PoolFile:
        """Decode the pool once; what is no sample goes to `rejected.jsonl`."""
        args.out.mkdir(parents=True, exist_ok=True)
        pad_id = self.loaded.tokenizer.pad_token_id
        rejected = args.out / "rejected.jsonl"
        return read_pool(
            args.pool, self.decoder, pad_id, rejected, lambda count: advance("reading", count, self.pool_bytes)
        )


def load_inputs(args: argparse.Namespace) -> Inputs:
    """Load what the common options name. Raises SettingsError for whatever the user can mend."""
    pool_bytes = size_of(args.pool)
    model = ModelSettings(name=args.model, gguf_file=args.gguf_file, dtype=args.dtype, device=args.device)
    loaded = load_model(model, args.seed)
    decoder = Decoder(loaded.tokenizer, SampleSettings(max_tokens=args.max_tokens), loaded.max_positions)
    target = collate(read_samples(args.target, decoder, MAX_TARGET, "--target"), loaded.tokenizer.pad_token_id)
    return Inputs(loaded, decoder, target, pool_bytes)


@contextmanager
def progress_bars() -> Iterator[Advance]:
    """A bar for each phase on standard error, if that is a terminal: a log is no place for bars."""
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


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Model, files, limits and randomness: what every selection from a file needs."""
    parser.add_argument("--model", required=True, metavar="M", help="model directory or hub name")
    parser.add_argument("--gguf-file", metavar="F", help="a GGUF file inside the model directory")
    parser.add_argument("--pool", required=True, type=Path, metavar="FILE", help="JSONL file to select from")
    parser.add_argument("--target", required=True, type=Path, metavar="FILE", help="JSONL file to get better at")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory to write to")
    parser.add_argument("--max-tokens", type=at_least(2), default=512, metavar="T", help="tokens per sample (512)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="arithmetic of the passes")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice (0)")


def share(text: str) -> float:
    """`10%` or `0.1`, above none."""
    value = share_or_none(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text} is none at all; write a share above zero, as 10% or 0.1")
    return value


def share_or_none(text: str) -> float:
    """`10%` or `0.1`, from none to all."""
    value = _number(text[:-1]) / 100 if text.endswith("%") else _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share; write it as 10% or 0.1")
    return value


def finite(text: str) -> float:
    """A finite number."""
    if not math.isfinite(_number(text)):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return _number(text)


def not_negative(text: str) -> float:
    """A finite number of at least 0."""
    value = _number(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text} is no number of at least 0")
    return value


def _number(text: str) -> float:
    """The number, or NaN."""
    try:
        return float(text)
    except ValueError:
        return math.nan
