"""What a process that is killed leaves behind: at which step, and in the end because of which sample.

A note is written before and after every step. A process that finds that the last one died in step n tries the samples
of step n one at a time, and notes each before it tries it. A sample that two processes in a row died of is
dead-lettered. So a record that has the kernel kill the trainer ends it three times and not for ever.

A kill leaves what was written to a file, so a step costs no sync: only the notes of single samples are made durable.
The note lies in this process's own claim of `checkpoint.dir` (see `ownership`), and begins as a copy of the last one's.
A process that was taken over and wakes up writes to what is gone.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from stream_trainer.checkpoints.ownership import Owner, note_in
from stream_trainer.records import Sample

logger = logging.getLogger(__name__)


class Attempts:
    """The notes of this process, begun with those of the last one."""

    def __init__(self, owner: Owner) -> None:
        self._owner, self._path = owner, owner.path
        self._offset = len(owner.words)
        self._checkpoint: int | None = None
        self._died_in: int | None = None
        self._suspect: list[list[Any]] = []
        self._killers: list[list[Any]] = []
        self._file: int | None = None
        self._length = 0
        self._failing = False

    def begin(self, checkpoint: int | None) -> None:
        """Read what the last process left, if it began at the same checkpoint (its step, or None).

        One that died in a step behind a checkpoint, and was not told yet that this is written, began at it, too.
        """
        self._checkpoint = checkpoint
        found = self._owner.agreed(self._open())
        before, step = found.get("checkpoint"), found.get("step")
        if step is None:
            return
        untold = before is not None and checkpoint is not None and before < checkpoint < step
        if before != checkpoint and not untold:
            return
        self._died_in, self._killers = found["step"], found["killers"]
        trying = found["trying"]
        if trying and trying == found["suspect"]:
            self._killers.append(max(trying, key=lambda entry: entry[2]))  # of many, the one that takes the most memory
        else:
            self._suspect = trying
        logger.warning("the last process died in step %d; its samples are tried one at a time", self._died_in)

    @property
    def suspects(self) -> bool:
        """Whether the step that the last process died in is still to come."""
        return self._died_in is not None

    def enter(self, step: int) -> bool:
        """Note that a step begins. Returns whether the last process died in it."""
        self._write(step)
        return step == self._died_in

    def trying(self, step: int, samples: Sequence[Sample]) -> None:
        """Note, durably, what may kill this process next."""
        self._write(step, [_entry(sample) for sample in samples], durably=True)

    def has_killed(self, sample: Sample) -> bool:
        """Whether earlier processes died of a sample."""
        return any(entry[:2] == _entry(sample)[:2] for entry in self._killers)

    def leave(self, step: int) -> None:
        """Note that a step is over."""
        if step == self._died_in:
            self._died_in, self._suspect = None, []
        self._write(None)

    def saved(self, checkpoint: int) -> None:
        """Begin anew at a checkpoint: nothing before it is tried again."""
        self._checkpoint, self._killers = checkpoint, []
        self._write(None)

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self) -> dict[str, Any]:
        """Keep our claim open; returns what it says, which stays until a step. It is not made if it is gone."""
        content = b""
        if not self._owner.writes:
            return {}
        with self._never_failing():
            self._file = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            content = note_in(os.pread(self._file, os.fstat(self._file).st_size, 0))
            self._length = len(content)
        return _parsed(content)

    def _write(self, step: int | None, trying: Sequence[Any] = (), *, durably: bool = False) -> None:
        """In place, in one call."""
        if self._file is None:
            return
        note = {"checkpoint": self._checkpoint, "step": step, "trying": list(trying)}
        text = json.dumps(note | {"suspect": self._suspect, "killers": self._killers}).encode()
        self._length = max(self._length, len(text))
        with self._never_failing():
            os.pwrite(self._file, text.ljust(self._length), self._offset)
            if durably:
                os.fsync(self._file)

    @contextmanager
    def _never_failing(self) -> Iterator[None]:
        """Without a note, a killed process is only harder to get past: training goes on."""
        try:
            yield
        except OSError as error:
            if not self._failing:
                logger.warning("%s cannot be written (%s); training goes on", self._path, error.strerror)
            self._failing = True


def _entry(sample: Sample) -> list[Any]:
    return [str(sample.partition), sample.offset, sample.num_tokens]


def _parsed(content: bytes) -> dict[str, Any]:
    """Nothing where it is no note."""
    try:
        found = json.loads(content)
        return found if {"checkpoint", "step", "trying", "suspect", "killers"} <= found.keys() else {}
    except (ValueError, AttributeError):
        return {}
