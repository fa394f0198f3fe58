"""What the offline selections share: options and the types of their values, what they read, and progress."""

import argparse
import math
import sys
import time
from collections import Counter
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

from stream_trainer.commands.pool_file import PoolFile, as_lines, read_pool
from stream_trainer.formats.files import look
from stream_trainer.models.loading import LoadedModel, load_model
from stream_trainer.samples.collate import collate
from stream_trainer.samples.decoder import Decoder, read_samples
from stream_trainer.settings.numbers import at_least
from stream_trainer.settings.schema import ModelSettings, SampleSettings

MAX_TARGET = 1024  # target samples used, from the top of the file
LINES_EVERY_S = 15.0  # as `run` writes its own

Advance = Callable[[str, int, int], None]
"""Told of a phase, what was done of it since the last time, and how much there is in all."""


@dataclass(frozen=True)
class Inputs:
    """What a selection works on: a model, and the target as one batch."""

    loaded: LoadedModel
    decoder: Decoder
    target: Batch

    @contextmanager
    def pool(self, args: argparse.Namespace, advance: Advance) -> Iterator[PoolFile]:
        """The pool, decoded once; what is no sample goes to `rejected.jsonl`."""
        args.out.mkdir(parents=True, exist_ok=True)
        pad_id, rejected = self.loaded.tokenizer.pad_token_id, args.out / "rejected.jsonl"
        with as_lines(args.pool, args.out) as path:
            size = path.stat().st_size

            def read(count: int) -> None:
                advance("reading", count, size)

            yield read_pool(path, f"--pool={args.pool}", self.decoder, pad_id, rejected, read)


def load_inputs(args: argparse.Namespace) -> Inputs:
    """Load what the common options name. Raises SettingsError for whatever the user can mend."""
    look(args.pool, f"--pool={args.pool}")
    model = ModelSettings(name=args.model, gguf_file=args.gguf_file, dtype=args.dtype, device=args.device)
    loaded = load_model(model, args.seed)
    decoder = Decoder(loaded.tokenizer, SampleSettings(max_tokens=args.max_tokens), loaded.max_positions)
    target = collate(read_samples(args.target, decoder, MAX_TARGET, "--target"), loaded.tokenizer.pad_token_id)
    return Inputs(loaded, decoder, target)


@contextmanager
def progress_bars() -> Iterator[Advance]:
    """A bar for each phase on standard error, if that is a terminal; else a line from time to time."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    if not console.is_terminal:
        yield plain_lines(lambda line: print(line, file=sys.stderr, flush=True))
        return
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, TaskID] = {}

        def advance(phase: str, count: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.advance(tasks[phase], count)

        yield advance


def plain_lines(write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> Advance:
    """Writes a line for each phase when it is done, and every `LINES_EVERY_S` before that."""
    done: Counter[str] = Counter()
    last = clock()

    def advance(phase: str, count: int, total: int) -> None:
        nonlocal last
        done[phase] += count
        ends = done[phase] >= total > done[phase] - count
        if ends or clock() - last >= LINES_EVERY_S:
            last = clock()
            write(f"{phase}: {done[phase]} of {total}")

    return advance


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Model, files, limits and randomness: what every selection from a file needs."""
    parser.add_argument("--model", required=True, metavar="M", help="model directory or hub name")
    parser.add_argument("--gguf-file", metavar="F", help="a GGUF file inside the model directory")
    parser.add_argument("--pool", required=True, type=Path, metavar="FILE", help="file to select from")
    parser.add_argument("--target", required=True, type=Path, metavar="FILE", help="file to get better at")
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
