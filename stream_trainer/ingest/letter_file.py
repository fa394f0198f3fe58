"""Dead letters in a file of JSON lines, each exactly once.

A checkpoint stores how long the file was and whose line ends there. A resumed run cuts the file back to that, for what
came after is read, and kept, again. Nothing is cut unless the file is the one that was meant and all that would go is
this trainer's own. `FILE.1`, `FILE.2`, ... are what was put aside when the file had grown to its bound, oldest first.
"""

import errno
import fcntl
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from stream_trainer.checkpoints.trouble import sync_directory
from stream_trainer.errors import SettingsError, SourceError
from stream_trainer.ingest.letter import DeadLetter, are_too_many, to_json
from stream_trainer.ingest.letter_mark import Mark, aside, cut_back, mark_at_end, rotated

RETRY_S = 1.0

logger = logging.getLogger(__name__)


class FileDeadLetters:
    """Appends to a file that only its owner may read, for it holds what users sent.

    A disk that is full or fails is waited for: letters are held meanwhile. Several processes may append to one file,
    and a file that is moved away is begun anew.
    """

    def __init__(self, path: Path, owner: str = "", max_bytes: int | None = None, keep: int = 10) -> None:
        """`owner` marks the letters as one's own; of the files put aside at `max_bytes` the newest `keep` stay.

        Raises SettingsError if the file cannot be opened for writing.
        """
        self._path, self._owner, self._max_bytes, self._keep = path, owner, max_bytes, keep
        self._lock = threading.Lock()
        self._held: deque[DeadLetter] = deque()
        self._kept: list[DeadLetter] = []
        self._retry_at = 0.0
        self._failing = self._closed = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._open()
            _drop_torn_line(self._descriptor)
            self._mark = mark_at_end(path, self._descriptor)
        except OSError as error:
            raise SettingsError(
                f"dead_letters.path={path} cannot be written ({error.strerror}); name a writable file"
            ) from error
        self._needed = self._stored = self._mark.generation  # what the last checkpoints refer to

    def send(self, letter: DeadLetter) -> None:
        """Append one line, or hold the letter if the disk does not take it now."""
        with self._lock:
            self._held.append(replace(letter, trainer=self._owner))
            self._write_held()

    def settled(self) -> list[DeadLetter]:
        """What is in the file since the last call."""
        with self._lock:
            if self._held and time.monotonic() >= self._retry_at:
                self._write_held()
            kept, self._kept = self._kept, []
            return kept

    def wait(self) -> None:
        """Nothing to wait for: a line is in the file at once, or the disk is in trouble."""

    def flush(self) -> None:
        """Sync the file to disk, and delete files that were put aside long ago."""
        with self._lock:
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                raise SourceError(
                    f"dead_letters.path={self._path} cannot be made durable ({error.strerror}); free some space, or "
                    "name another file"
                ) from error
            self._delete_old()

    @property
    def held(self) -> int:
        """Letters that wait for the disk."""
        return len(self._held)

    @property
    def full(self) -> bool:
        """Whether to read nothing more for now."""
        with self._lock:
            return are_too_many(self._held)

    def state_dict(self) -> dict[str, Any]:
        """Which file is written, how long it is, and the position of the letter that ends there."""
        with self._lock:
            self._needed, self._stored = self._stored, self._mark.generation
            return self._mark.to_json()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Cut off what was written after this state, if that is safe; warn if it is not."""
        if state.keys() == {"in_topic"}:  # letters went to a topic then, and none to a file
            return
        mark = Mark.from_json(state)
        with self._lock:
            self._needed = self._stored = mark.generation
            try:
                with self._locked():
                    if cut_back(self._path, mark, self._owner):
                        self._reopen(mark.generation)
            except OSError as error:
                logger.warning("%s could not be cut back (%s): some letters may be there twice", self._path, error)

    def close(self) -> None:
        """Sync and close the file. Records whose letters are held are undecided, so nothing is lost."""
        if self._closed:
            return
        self._closed = True
        try:
            self.flush()
        finally:
            os.close(self._descriptor)

    def _open(self) -> int:
        descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        sync_directory(self._path.parent)  # a new file's name
        return descriptor

    def _reopen(self, generation: int = 1) -> None:
        previous, self._descriptor = self._descriptor, self._open()
        os.close(previous)
        self._mark = mark_at_end(self._path, self._descriptor, generation)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Nobody else appends, cuts or puts aside meanwhile, and the open file is the one of that name."""
        self._take_lock()
        while not self._is_current():
            self._reopen()
            self._take_lock()
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _take_lock(self) -> None:
        with suppress(OSError):  # where a file system has no locks, nobody is kept apart
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def _write_held(self) -> None:
        try:
            with self._locked():
                while self._held:
                    self._append(self._held[0])
                    self._kept.append(self._held.popleft())
        except OSError as error:
            self._retry_at = time.monotonic() + RETRY_S
            if not self._failing:
                logger.warning("dead_letters.path=%s cannot be written for now (%s); trying on", self._path, error)
            self._failing = True
        else:
            if self._failing:
                logger.info("dead_letters.path=%s can be written again", self._path)
            self._failing = False

    def _append(self, letter: DeadLetter) -> None:
        line, size = to_json(letter), os.fstat(self._descriptor).st_size
        if self._max_bytes is not None and size and size + len(line) > self._max_bytes:
            self._put_aside()
            size = 0
        if os.write(self._descriptor, line) != len(line):
            os.ftruncate(self._descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._mark = Mark(self._mark.generation, size + len(line), letter.position)

    def _put_aside(self) -> None:
        os.fsync(self._descriptor)
        number = self._mark.generation
        self._path.rename(aside(self._path, number))
        self._reopen(number + 1)
        self._take_lock()
        logger.info("%s has grown to dead_letters.max_bytes=%d and is put aside", self._path, self._max_bytes)

    def _delete_old(self) -> None:
        """All but the newest `keep`, and none that a run resumed from the last checkpoint would have to cut."""
        for number in rotated(self._path) if self._max_bytes is not None else ():
            if number < min(self._mark.generation - self._keep, self._needed):
                aside(self._path, number).unlink(missing_ok=True)
                logger.info("%s is deleted: dead_letters.keep=%d", aside(self._path, number), self._keep)


def _drop_torn_line(descriptor: int) -> None:
    """Cut off a last line that a crash left in part: it was never flushed, so its record is read again."""
    size = os.fstat(descriptor).st_size
    end = size
    while end and os.pread(descriptor, 1, end - 1) != b"\n":
        end -= 1
    if end < size:
        logger.warning("the dead letters end in a torn line of %d bytes, which is dropped", size - end)
        os.ftruncate(descriptor, end)
