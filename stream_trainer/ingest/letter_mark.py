"""Where a file of dead letters stood at a checkpoint, and how to bring it back there without harm to anybody."""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stream_trainer.ingest.letter import DeadLetter, from_json

BLOCK_BYTES = 64 * 1024

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in the files.

    Attributes:
        generation: number of the file in turn: 1 more than that of the last one put aside.
        length: its bytes up to the mark.
        last: position of the letter that ends there, by which the file is known again; None if there is none.
    """

    generation: int
    length: int
    last: str | None

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> "Mark":
        """Inverse of `to_json`. Raises ValueError if it is no mark."""
        try:
            return cls(int(state["generation"]), int(state["length"]), state["last"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{dict(state)} is no place in a file of dead letters") from error


def aside(path: Path, number: int) -> Path:
    """The name under which a file is put aside."""
    return path.with_name(f"{path.name}.{number}")


def rotated(path: Path) -> list[int]:
    """Numbers of the files that were put aside, oldest first."""
    pattern = re.compile(re.escape(path.name) + r"\.(\d+)")
    return sorted(int(match[1]) for found in path.parent.iterdir() if (match := pattern.fullmatch(found.name)))


def mark_at_end(path: Path, descriptor: int, at_least: int = 1) -> Mark:
    """The mark at the end of the open file; `at_least` is what a checkpoint knows of its generation."""
    size = os.fstat(descriptor).st_size
    return Mark(max(at_least, *(number + 1 for number in rotated(path)), 1), size, _last_before(descriptor, size))


def cut_back(path: Path, mark: Mark, owner: str) -> bool:
    """Remove what was written after the mark, if all of it is `owner`'s. Returns whether the file is at the mark now.

    What cannot be removed safely stays, with a warning: some letters may then be there twice. Raises OSError.
    """
    files = _files_from(path, mark)
    if not files:
        logger.warning("%s is not the file of the checkpoint and stays as it is: some letters may be there twice", path)
        return False
    owners = set(_owners(files[0], mark.length)).union(*(_owners(later, 0) for later in files[1:]))
    if owners - {owner}:
        logger.warning("%s has letters of others behind the checkpoint and stays: some may be there twice", path)
        return False
    if owners or len(files) > 1:
        _cut(files, mark.length)
        logger.info("%s is cut back to the checkpoint: what came after it is read again", path)
    return True


def _cut(files: list[Path], length: int) -> None:
    """After a crash between any two of these calls the same again ends in the same files."""
    with files[0].open("r+b") as file:
        os.ftruncate(file.fileno(), length)
        os.fsync(file.fileno())
    for later in files[1:-1]:
        later.unlink()
    if len(files) > 1:
        files[0].rename(files[-1])


def _files_from(path: Path, mark: Mark) -> list[Path]:
    """The file of the mark and those after it, up to the one that is written; empty if the mark does not fit."""
    numbers = [number for number in rotated(path) if number >= mark.generation]
    if numbers and numbers[0] != mark.generation:
        return []
    files = [*(aside(path, number) for number in numbers), path]
    with files[0].open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        fits = size >= mark.length and _last_before(file.fileno(), mark.length) == mark.last
    return files if fits else []


def _owners(path: Path, start: int) -> Iterator[str | None]:
    """Whose the letters from `start` on are; None for a line that is no letter."""
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            letter = _parsed(line)
            yield None if letter is None else letter.trainer


def _last_before(descriptor: int, end: int) -> str | None:
    """Position of the letter whose line ends at `end`; None if there is none."""
    if not end:
        return None
    begin, line = end, b""
    while begin and b"\n" not in line[:-1]:
        size = min(begin, BLOCK_BYTES)
        begin -= size
        line = os.pread(descriptor, size, begin) + line
    letter = _parsed(line[:-1].rpartition(b"\n")[2]) if line.endswith(b"\n") else None
    return None if letter is None else letter.position


def _parsed(line: bytes) -> DeadLetter | None:
    try:
        return from_json(line)
    except (ValueError, KeyError, TypeError):
        return None
