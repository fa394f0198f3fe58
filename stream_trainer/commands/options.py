"""Command-line options that the offline selections share, and the types of their values."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path


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


def at_least(least: int) -> Callable[[str], int]:
    """A whole number of at least `least`."""

    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is no whole number of at least {least}")
        return int(text)

    return whole_number


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
