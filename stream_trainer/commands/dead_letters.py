"""`stream-trainer dead-letters`: what could not be used and why, and the values, to be mended and published again."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from stream_trainer.errors import SettingsError
from stream_trainer.ingest.dead_letters import DeadLetter, read_dead_letters

EXAMPLES = """\
examples:
  stream-trainer dead-letters dead-letters.jsonl
  stream-trainer dead-letters dead-letters.jsonl --reason bad_json --values > mend.jsonl
  stream-trainer produce mend.jsonl --topic samples

A record that was read again after a crash may be there twice, with the same position; it is counted and written once.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("file", type=Path, help="file of dead letters (dead_letters.path)")
    parser.add_argument("--reason", metavar="NAME", help="only those with this reason")
    parser.add_argument("--values", action="store_true", help="write the original values, one a line, instead")


def run(args: argparse.Namespace) -> int:
    """Print what the file holds. Returns the exit code. Raises SettingsError if it cannot be read or has no such."""
    try:
        letters = _distinct(read_dead_letters(args.file))
    except OSError as error:
        raise SettingsError(f"{args.file} cannot be read ({error.strerror}); name a file of dead letters") from None
    reasons = sorted({letter.reason for letter in letters})
    if args.reason is not None and args.reason not in reasons:
        raise SettingsError(f"--reason {args.reason} is in no dead letter of {args.file}; it has {', '.join(reasons)}")
    wanted = [letter for letter in letters if args.reason in (None, letter.reason)]
    if args.values:
        _write_values(wanted, sys.stdout.buffer)
    else:
        _print_reasons(wanted)
    return 0


def _distinct(letters: Iterable[DeadLetter]) -> list[DeadLetter]:
    return list({(letter.record.partition, letter.record.offset): letter for letter in letters}.values())


def _print_reasons(letters: list[DeadLetter]) -> None:
    """The most frequent reason first, each with the first record as an example."""
    examples = {letter.reason: letter for letter in reversed(letters)}
    for reason, count in Counter(letter.reason for letter in letters).most_common():
        example = examples[reason]
        print(
            f"{count:8,}  {reason}, first {example.record.partition} offset {example.record.offset}: {example.detail}"
        )
    print(f"{len(letters):8,}  in all")


def _write_values(letters: list[DeadLetter], out: BinaryIO) -> None:
    """One value a line: a line break inside JSON is white space, anywhere else it leaves the value out."""
    values = [letter.record.value for letter in letters if letter.record.value is not None]
    lines = [line for line in map(_as_line, values) if line is not None]
    out.writelines(line + b"\n" for line in lines)
    out.flush()
    if len(lines) < len(letters):
        broken, empty = len(values) - len(lines), len(letters) - len(values)
        print(f"left out: {broken} with line breaks that are no JSON, {empty} without a value", file=sys.stderr)


def _as_line(value: bytes) -> bytes | None:
    if b"\n" not in value and b"\r" not in value:
        return value
    try:
        return json.dumps(json.loads(value), ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
