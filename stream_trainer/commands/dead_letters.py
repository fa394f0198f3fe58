"""`stream-trainer dead-letters inspect`: what could not be used and why, and the values, to be mended."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable
from typing import BinaryIO

from stream_trainer.commands.letters import add_letter_arguments, wanted_letters
from stream_trainer.ingest.letter import DeadLetter

SHOWN_BYTES = 300

EXAMPLES = """\
examples:
  stream-trainer dead-letters inspect dead-letters.jsonl
  stream-trainer dead-letters inspect --topic samples.dead-letters --show-values
  stream-trainer dead-letters inspect dead-letters.jsonl --reason bad_json --values > mend.jsonl
  stream-trainer produce mend.jsonl --topic samples

A letter that is there twice, with the same position, is counted and written once.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add_letter_arguments(parser)
    parser.add_argument("--show-values", action="store_true", help="show the beginning of each example's value")
    parser.add_argument("--values", action="store_true", help="write the original values, one a line, instead")


def run(args: argparse.Namespace) -> int:
    """Print what there is. Returns the exit code. Raises SettingsError if it cannot be read or has no such reason."""
    letters = wanted_letters(args)
    if args.values:
        _write_values(letters, sys.stdout.buffer)
    else:
        _print_reasons(letters, args.show_values)
    return 0


def _print_reasons(letters: Iterable[DeadLetter], show_values: bool) -> None:
    """The most frequent reason first, each with the first record as an example."""
    examples: dict[str, DeadLetter] = {}
    counts = Counter[str]()
    for letter in letters:
        examples.setdefault(letter.reason, letter)
        counts[letter.reason] += 1
    for reason, count in counts.most_common():
        example = examples[reason]
        record = example.record
        print(f"{count:8,}  {reason}, first {record.partition} offset {record.offset}: {example.detail}")
        if show_values:
            print(f"{'':10}{(record.value or b'')[:SHOWN_BYTES]!r}")
    print(f"{counts.total():8,}  in all")


def _write_values(letters: Iterable[DeadLetter], out: BinaryIO) -> None:
    """One value a line: a line break inside JSON is white space, anywhere else it leaves the value out."""
    broken = empty = 0
    for letter in letters:
        value = letter.record.value
        line = None if value is None else _as_line(value)
        empty += value is None
        broken += value is not None and line is None
        if line is not None:
            out.write(line + b"\n")
    out.flush()
    if broken or empty:
        print(f"left out: {broken} with line breaks that are no JSON, {empty} without a value", file=sys.stderr)


def _as_line(value: bytes) -> bytes | None:
    if b"\n" not in value and b"\r" not in value:
        return value
    try:
        return json.dumps(json.loads(value), ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
