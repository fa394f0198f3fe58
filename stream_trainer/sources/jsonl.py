"""A file of one JSON object a line, or a stream such as standard input, as a source. Positions are byte offsets.

A file of another format (see `formats.files`) is read too, from its beginning to its end. Its positions are numbers of
records.

A file is read from its cursor on. A stream cannot be sought (standard input, a FIFO): what lies before the cursor is
read and dropped, so piping the same bytes in again resumes where a run ended. A stream ends when its writer closes it,
with or without `follow`.

Lines are returned as they are, empty ones too: what is no sample is dead-lettered later, with its position.
"""

import logging
import os
import select
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

from stream_trainer.errors import DataLossError, SettingsError, SourceError
from stream_trainer.formats.array import FormError
from stream_trainer.formats.files import LINES, form_of, form_of_bytes, records_in
from stream_trainer.formats.tables import EndsBeforeError
from stream_trainer.records import Partition, Record
from stream_trainer.settings.sections.source import JsonlSettings

CHUNK_BYTES = 64 * 1024
CHUNK_RECORDS = 64
MAX_LINE_BYTES = 64 * 1024 * 1024  # of a longer line only these first bytes are kept; it is no sample anyway
FOLLOW_INTERVAL_S = 0.05

logger = logging.getLogger(__name__)


class JsonlSource:
    """The source for `source.kind: jsonl`. See `sources.base.Source` for the protocol."""

    reachable = True
    records_lost = 0  # a file that has lost bytes ends the run: what is missing cannot be told
    replaced: Mapping[Partition, int] = {}
    fences = False

    def __init__(self, settings: JsonlSettings) -> None:
        self._path = settings.path or "-"
        self._follow = settings.follow
        # However the path is spelled, it is the same file to a cursor.
        self._partition = Partition(self._path if self._path == "-" else os.path.abspath(self._path), 0)
        self._fd: int | None = None
        self._records: Iterator[bytes] | None = None  # of a file of another format
        self._is_stream = False
        self._to_skip = 0  # bytes of a stream that come before the cursor
        self._line = bytearray()  # the beginning of the line whose end has not been read
        self._line_start = 0
        self._read_to = 0
        self._paused = False
        self._at_end = False

    def start(
        self,
        cursor: Mapping[Partition, int],
        identity: Mapping[str, str],  # noqa: ARG002
        marks: Mapping[Partition, tuple[int, str]],  # noqa: ARG002
    ) -> None:
        """Open the file and go to the cursor.

        Raises SettingsError if it cannot be opened, DataLossError if it ends before the cursor or has no line there.
        """
        position = cursor.get(self._partition, 0)
        if others := sorted(p.topic for p in cursor if p != self._partition):
            logger.warning("the cursor of %s is left behind: source.jsonl.path=%s", ", ".join(others), self._path)
        if self._is_of_another_form():
            self._line_start = position
            self._records = records_in(Path(self._path), f"source.jsonl.path={self._path}", position)
            return
        self._fd = self._open()
        self._is_stream = not stat.S_ISREG(os.fstat(self._fd).st_mode)
        self._line_start = position
        if self._is_stream:
            self._to_skip = position
            if position:
                logger.info("source.jsonl.path=%s: dropping the %d bytes before the cursor", self._path, position)
        else:
            self._seek(position)

    def poll(self, timeout_s: float) -> list[Record]:
        """Lines in order, about `CHUNK_BYTES` of them at a time.

        Raises DataLossError if the file was cut or replaced while it is read, SourceError if a stream is in another
        format, or a file of one cannot be read to its end.
        """
        if self._paused or self._at_end:
            time.sleep(timeout_s)
            return []
        if self._records is not None:
            return self._take_records(self._records)
        deadline = time.monotonic() + timeout_s
        while True:
            chunk = self._read_stream(deadline) if self._is_stream else self._read_file()
            if chunk:
                records = self._split(chunk)
            elif chunk is not None and (self._is_stream or not self._follow):
                return self._end()
            else:
                self._wait(deadline)
                records = []
            if records or time.monotonic() >= deadline:
                return records

    @property
    def finite(self) -> bool:
        """Whether the run ends with the file."""
        return not self._follow or self._is_stream

    @property
    def drained(self) -> frozenset[Partition]:
        """The file, once its last line has been returned."""
        return frozenset((self._partition,)) if self._at_end else frozenset()

    def hold(self, partitions: frozenset[Partition]) -> None:
        """There is no other partition to wait for."""

    def held_back(self) -> Mapping[Partition, int]:
        """A file has no transactions."""
        return {}

    def without_leader(self) -> frozenset[Partition]:
        """A file needs no leader."""
        return frozenset()

    def pause(self) -> None:
        """Stop reading."""
        self._paused = True

    def resume(self) -> None:
        """Read again."""
        self._paused = False

    def commit(self, positions: Mapping[Partition, int], step: int) -> None:
        """Nobody else keeps positions in a file."""

    def positions(self) -> Mapping[Partition, int]:
        """Where the next record starts."""
        return {self._partition: self._line_start}

    def end_positions(self) -> Mapping[Partition, int]:
        """The file's size; of a stream and of a file of another format, what has been read of it."""
        if self._fd is None or self._is_stream:
            return {self._partition: max(self._read_to, self._line_start)}
        return {self._partition: os.fstat(self._fd).st_size}

    @property
    def retention_s(self) -> None:
        """A file is not shortened by age."""
        return None

    def identity(self) -> Mapping[str, str]:
        """Empty: nothing tells a file from another of its name."""
        return {}

    @property
    def exhausted(self) -> bool:
        """Whether the last line has been returned."""
        return self._at_end

    def close(self) -> None:
        """Close the file; standard input stays open."""
        if self._fd is not None and self._path != "-":
            os.close(self._fd)
        self._fd = None

    def _is_of_another_form(self) -> bool:
        """Raises SettingsError if it is one that cannot be read, or not as it grows."""
        if self._path == "-" or not (os.path.isfile(self._path) or os.path.isdir(self._path)):
            return False
        label = f"source.jsonl.path={self._path}"
        form = form_of(Path(self._path), label)
        if form != LINES and self._follow:
            raise SettingsError(
                f"source.jsonl.follow=true: {label} is {form}, which cannot be followed; set it to false"
            )
        return form != LINES

    def _take_records(self, records: Iterator[bytes]) -> list[Record]:
        """The next ones of a file of another format."""
        try:
            values = list(islice(records, CHUNK_RECORDS))
        except EndsBeforeError:
            raise self._cut(f"ends before record {self._line_start}, where the cursor is") from None
        except SettingsError as error:
            raise SourceError(str(error)) from None
        first = self._line_start
        self._line_start += len(values)
        self._at_end = not values
        return [Record(self._partition, at, at + 1, value) for at, value in enumerate(values, start=first)]

    def _open(self) -> int:
        if self._path == "-":
            return sys.stdin.fileno()
        try:
            return os.open(self._path, os.O_RDONLY)
        except OSError as error:
            raise SettingsError(
                f"source.jsonl.path={self._path} cannot be opened ({error.strerror}); correct the path"
            ) from None

    def _seek(self, position: int) -> None:
        """Go to `position`, which must be the start of a line or the end of the file."""
        assert self._fd is not None
        size = os.fstat(self._fd).st_size
        if position > size:
            raise self._cut(f"ends at byte {size}, but the cursor is {position}")
        around = os.pread(self._fd, 2, position - 1) if position else b""
        if around[1:] == b"\n" and around[:1] != b"\n":
            position += 1  # the last line had no newline when it was read; now it has
        elif len(around) == 2 and around[:1] != b"\n":
            raise self._cut(f"has no line starting at the cursor, byte {position}")
        self._line_start = self._read_to = os.lseek(self._fd, position, os.SEEK_SET)

    def _read_stream(self, deadline: float) -> bytes | None:
        """What has arrived after the cursor; None if nothing did before `deadline`, empty at the end."""
        assert self._fd is not None
        while select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            chunk = os.read(self._fd, CHUNK_BYTES)
            if not self._read_to:
                self._require_lines(chunk)
            self._read_to += len(chunk)
            wanted = chunk[self._to_skip :]
            self._to_skip -= len(chunk) - len(wanted)
            if wanted:
                return wanted
            if not chunk:
                if self._to_skip:
                    raise self._cut(f"ended {self._to_skip} bytes before the cursor, {self._line_start}")
                return b""
        return None

    def _require_lines(self, head: bytes) -> None:
        """A stream cannot be read twice, so it must be lines of JSON."""
        try:
            form = form_of_bytes(head)
        except FormError as error:
            raise SourceError(f"source.jsonl.path={self._path} {error}") from None
        if form != LINES:
            raise SourceError(f"source.jsonl.path={self._path} is {form}; pipe one JSON object a line, or name a file")

    def _read_file(self) -> bytes:
        assert self._fd is not None
        chunk = os.read(self._fd, CHUNK_BYTES)
        self._read_to += len(chunk)
        return chunk

    def _wait(self, deadline: float) -> None:
        """Let a followed file grow. It must stay the same file, and never shrink."""
        if self._is_stream:
            return
        assert self._fd is not None
        mine = os.fstat(self._fd)
        if mine.st_size < self._read_to:
            raise self._cut(f"was cut to {mine.st_size} bytes, of which {self._read_to} had been read")
        try:
            same = os.path.samestat(mine, os.stat(self._path))
        except FileNotFoundError:
            same = False
        if not same:
            raise self._cut("was moved or replaced while it was followed")
        time.sleep(min(FOLLOW_INTERVAL_S, max(0.0, deadline - time.monotonic())))

    def _split(self, chunk: bytes) -> list[Record]:
        """The lines that end in `chunk`, the first of which may have begun before it."""
        *ended, rest = chunk.split(b"\n")
        records = []
        position = self._read_to - len(chunk)
        for line in ended:
            position += len(line) + 1
            self._append(line)
            records.append(self._take_line(position))
        self._append(rest)
        return records

    def _append(self, piece: bytes) -> None:
        self._line += piece[: max(0, MAX_LINE_BYTES - len(self._line))]

    def _take_line(self, next_offset: int) -> Record:
        record = Record(self._partition, self._line_start, next_offset, bytes(self._line))
        self._line.clear()
        self._line_start = next_offset
        return record

    def _end(self) -> list[Record]:
        """At the end of everything a last line counts without its newline."""
        self._at_end = True
        return [self._take_line(self._read_to)] if self._read_to > self._line_start else []

    def _cut(self, what: str) -> DataLossError:
        return DataLossError(
            f"source.jsonl.path={self._path} {what}; restore the file, or start anew with another checkpoint.dir"
        )
