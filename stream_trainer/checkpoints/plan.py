"""What each step is made of, in `<checkpoint.dir>/plan.jsonl`: enough to make the steps between two checkpoints again.

Before a step one line says which records have come, in which order, and which samples are drawn. After it another says
how it went. A kill leaves what was written to a file, so a step costs no sync: the file is made durable with each
checkpoint. Of several lines for a step the last counts, and one that differs from the one before ends what followed it.
Lines carry their step, so a checkpoint's step is their mark: those behind it are followed, or cut off.

Without a line a run goes on all the same: a disk that does not take it is reported once. A process begins with a copy
in the file's place, so one that was taken over and wakes up writes to what is gone.
"""

import errno
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from stream_trainer.checkpoints.directory import checkpoints_in, make_temporary
from stream_trainer.checkpoints.ownership import Owner
from stream_trainer.checkpoints.trouble import sync_directory

NAME = "plan.jsonl"

logger = logging.getLogger(__name__)


class Position(NamedTuple):
    """A record of the stream that is read."""

    partition: int
    offset: int


@dataclass(frozen=True)
class Planned:
    """A step that is about to be made.

    Attributes:
        saved: step of the newest checkpoint, None before there is one.
        topic: of the records: a Kafka topic, or a file.
        records: those that came since the step before, in order, up to the last sample among the candidates.
        candidates: samples that were drawn from: what waited, and what was taken since.
        drawn: the samples of the step.
    """

    step: int
    saved: int | None
    topic: str
    records: tuple[Position, ...]
    candidates: int
    drawn: tuple[Position, ...]

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> "Planned":
        """Inverse of `to_text`. Raises KeyError, TypeError or ValueError if it is none."""
        records, drawn = (tuple(Position(int(p), int(at)) for p, at in line[name]) for name in ("records", "drawn"))
        saved = None if line["saved"] is None else int(line["saved"])
        return cls(int(line["step"]), saved, str(line["topic"]), records, int(line["candidates"]), drawn)


@dataclass(frozen=True)
class Made:
    """How a step went.

    Attributes:
        result: of the step: one of `metrics.STEP_RESULTS`.
        solver: status of the program for the coefficients, if there was one.
        seconds: that its phases took, which some draws learn from.
        factor: what rollbacks had left of the learning rate.
        accused: partition and offset of samples that were taken out, and the reason.
    """

    step: int
    result: str
    solver: str | None
    seconds: float
    factor: float
    accused: tuple[tuple[int, int, str], ...] = ()

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> "Made":
        """Inverse of `to_text`. Raises KeyError, TypeError or ValueError if it is none."""
        accused = tuple((int(p), int(at), str(why)) for p, at, why in line["accused"])
        numbers = float(line["seconds"]), float(line["factor"])
        return cls(int(line["step"]), str(line["result"]), line["solver"], *numbers, accused)


@dataclass(frozen=True)
class Entry:
    """All that is written of a step. `made` is None if the process ended in it."""

    planned: Planned
    made: Made | None = None


def read_plan(path: Path) -> dict[int, Entry]:
    """Entries by step, in order; empty if there is no file. What is no line of a plan is left out. Raises OSError."""
    found: dict[int, Entry] = {}
    if not path.exists():
        return found
    with path.open("rb") as file:
        for text in file:
            line = _parsed(text)
            if isinstance(line, Planned):
                known = found.get(line.step)
                if known is None or known.planned != line:
                    found = {step: entry for step, entry in found.items() if step < line.step}
                found[line.step] = Entry(line, known.made if known is not None and known.planned == line else None)
            elif line is not None and line.step in found:
                found[line.step] = Entry(found[line.step].planned, line)
    return found


def to_text(line: Planned | Made) -> bytes:
    """A line of the file."""
    return json.dumps(vars(line), separators=(",", ":")).encode() + b"\n"


def lines_of(entries: Iterable[Entry]) -> bytes:
    """The lines of these entries."""
    lines = [line for entry in entries for line in (entry.planned, entry.made) if line is not None]
    return b"".join(map(to_text, lines))


@dataclass
class PlanFile:
    """The plan of the trainer that owns a directory."""

    directory: Path
    owner: Owner
    _file: int | None = field(default=None, init=False)
    _failing: bool = field(default=False, init=False)

    def begin(self, step: int, *, follow: bool) -> dict[int, Entry]:
        """Go on behind the checkpoint of a step; returns what an earlier process planned behind it.

        With `follow` that stays in the file, otherwise it is cut off. Raises FencedError if another has taken over.
        """
        entries: dict[int, Entry] = {}
        with self._never_failing():
            entries = read_plan(self.directory / NAME)
            kept = [entry for at, entry in entries.items() if follow or at <= step]
            self._replace(lines_of(kept))
        return {at: entry for at, entry in entries.items() if at > step}

    def append(self, line: Planned | Made) -> None:
        """Write a line, so that it outlives the process."""
        if self._file is None:
            return
        text = to_text(line)
        with self._never_failing():
            size = os.fstat(self._file).st_size
            if os.write(self._file, text) != len(text):
                os.ftruncate(self._file, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._failing = False

    def flush(self) -> None:
        """Make all lines durable."""
        if self._file is not None:
            with self._never_failing():
                os.fsync(self._file)

    def prune(self) -> None:
        """Drop the lines of steps up to that of the oldest checkpoint. Raises FencedError if another has taken over."""
        with self._never_failing():
            entries = read_plan(self.directory / NAME)
            oldest = min((found.step for found in checkpoints_in(self.directory)), default=0)
            if entries and min(entries) <= oldest:
                self._replace(lines_of(entry for step, entry in entries.items() if step > oldest))

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _replace(self, content: bytes) -> None:
        """Put a new file in the place of the old one, and keep it open."""
        folder = make_temporary(self.directory, self.owner.epoch, "plan")
        file = os.open(folder / NAME, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(os.dup(file), "wb") as copy:
                copy.write(content)
            os.fsync(file)
            self.owner.confirm()
            (folder / NAME).replace(self.directory / NAME)
            sync_directory(self.directory)
            folder.rmdir()
        except BaseException:
            os.close(file)
            raise
        self.close()
        self._file = file

    @contextmanager
    def _never_failing(self) -> Iterator[None]:
        """Without a line, a run can only not be replayed: training goes on."""
        try:
            yield
        except OSError as error:
            if not self._failing:
                logger.warning(
                    "%s cannot be written (%s); training goes on, and these steps cannot be replayed",
                    self.directory / NAME,
                    error.strerror,
                )
            self._failing = True


def _parsed(text: bytes) -> Planned | Made | None:
    try:
        line = json.loads(text)
        return Planned.from_json(line) if "records" in line else Made.from_json(line)
    except (ValueError, KeyError, TypeError):
        return None
