"""A file of samples to select from, and the files a selection leaves: what offline selectors share.

A pool of another format than lines of JSON is first written as these into a file that goes away with the run.

Lines are found again by their position, so a pool need not fit in memory; every use decodes them anew. Lines that are
no samples are set aside with the reason, as dead letters.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from gradient_selectors import Batch

from stream_trainer.errors import SampleError, SettingsError
from stream_trainer.formats.files import LINES, form_of, records_in
from stream_trainer.ingest.letter import DeadLetter, to_json
from stream_trainer.records import Partition, Record, Sample
from stream_trainer.samples.collate import collate
from stream_trainer.samples.decoder import Decoder

READ_TOGETHER = 1024  # lines decoded at a time


@dataclass(frozen=True)
class PoolFile:
    """The samples of a JSONL file, in its order.

    Attributes:
        label: what the user calls it, `--pool=FILE`.
        starts, sizes: bytes of each sample's line, newline included.
        lines: line number of each, from 1.
        ids: the producer's name for each, or None.
        lengths: tokens of each.
        rejected: lines that are no samples, by reason.
    """

    path: Path
    label: str
    decoder: Decoder
    pad_id: int
    starts: list[int]
    sizes: list[int]
    lines: list[int]
    ids: list[str | None]
    lengths: list[int]
    rejected: Counter[str]

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def reasons(self) -> str:
        """How many lines are no samples by reason, the commonest first."""
        return ", ".join(f"{reason} {count}" for reason, count in self.rejected.most_common())

    @property
    def rejections(self) -> str:
        """How many lines are no samples, and why."""
        return f"rejected {self.rejected.total()} lines ({self.reasons})"

    def samples(self, indices: Sequence[int]) -> list[Sample]:
        """Some samples, decoded anew. Raises SettingsError if the file has changed."""
        with self.path.open("rb") as file:
            records = [self._record(file, index) for index in indices]
        samples = []
        for index, result in zip(indices, self.decoder.decode_batch(records), strict=True):
            if not isinstance(result, Sample) or result.num_tokens != self.lengths[index]:
                raise SettingsError(f"{self.label} line {self.lines[index]} changed while it was read; run again")
            samples.append(result)
        return samples

    def batch(self, indices: Sequence[int]) -> Batch:
        """Some samples as tensors."""
        return collate(self.samples(indices), self.pad_id)

    def write_lines(self, indices: Sequence[int], path: Path) -> None:
        """Write the original lines of some samples, in the order given."""
        with self.path.open("rb") as file, replacing(path) as out:
            for index in indices:
                out.write((self._record(file, index).value or b"").rstrip(b"\r\n") + b"\n")

    def write_scores(self, indices: Sequence[int], scores: Sequence[float], path: Path) -> int:
        """Write `line`, `id`, `score` and `rank` of some samples, best first; returns how many have a rank.

        Samples whose score is not finite come last, with neither score nor rank.
        """
        order = sorted(range(len(indices)), key=lambda i: -scores[i] if math.isfinite(scores[i]) else math.inf)
        ranked = sum(math.isfinite(score) for score in scores)
        with replacing(path) as out:
            for rank, i in enumerate(order, start=1):
                score, place = (scores[i], rank) if rank <= ranked else (None, None)
                fields = {"line": self.lines[indices[i]], "id": self.ids[indices[i]], "score": score, "rank": place}
                out.write(json.dumps(fields).encode() + b"\n")
        return ranked

    def _record(self, file: BinaryIO, index: int) -> Record:
        start, size = self.starts[index], self.sizes[index]
        file.seek(start)
        return Record(Partition(str(self.path), 0), start, start + size, file.read(size))


def read_pool(
    path: Path, label: str, decoder: Decoder, pad_id: int, rejected: Path, progress: Callable[[int], None]
) -> PoolFile:
    """Decode every line once. Those that are no samples are written to `rejected`; blank lines are skipped.

    `progress` is told of bytes as they are read. Raises SettingsError if the file cannot be read or holds no
    sample, OSError if `rejected` cannot be replaced.
    """
    pool = PoolFile(path, label, decoder, pad_id, [], [], [], [], [], Counter())
    rejected.unlink(missing_ok=True)
    with open(rejected, "wb", opener=_owners_only) as rejects:
        for numbers, records in _chunks(path):
            for number, record, result in zip(numbers, records, decoder.decode_batch(records), strict=True):
                if isinstance(result, Sample):
                    pool.starts.append(record.offset)
                    pool.sizes.append(record.next_offset - record.offset)
                    pool.lines.append(number)
                    pool.ids.append(result.id)
                    pool.lengths.append(result.num_tokens)
                else:
                    error = result or SampleError("empty", "the line has no bytes")
                    rejects.write(to_json(DeadLetter(record, error.reason, str(error))))
                    pool.rejected[error.reason] += 1
            progress(records[-1].next_offset - records[0].offset)
    if not len(pool):
        count = f"{pool.rejected.total()} lines rejected"
        raise SettingsError(f"{label} holds no samples ({count}){_why(pool, rejected)}; correct the file")
    return pool


def _why(pool: PoolFile, rejected: Path) -> str:
    """By reason, with the detail of the first line, and where they are."""
    if not pool.rejected:
        return ""
    with rejected.open(encoding="utf-8") as lines:
        first = json.loads(next(lines))["detail"]
    return f": {pool.reasons}; the first {first}; they are in {rejected}"


def _owners_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


@contextmanager
def as_lines(path: Path, folder: Path) -> Iterator[Path]:
    """The pool as lines of JSON: itself, or a file in `folder` for as long as it is used. Raises SettingsError."""
    label = f"--pool={path}"
    if form_of(path, label) == LINES:
        yield path
        return
    with TemporaryDirectory(dir=folder, prefix=".pool-") as temporary:
        lines = Path(temporary) / path.name
        with lines.open("wb") as file:
            for value in records_in(path, label):
                # Between the parts of a value it is space, and inside a text it is written otherwise.
                file.write(value.replace(b"\n", b" ") + b"\n")
        yield lines


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its place once it is written to the end."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _chunks(path: Path) -> Iterator[tuple[list[int], list[Record]]]:
    """Lines that are not blank with their numbers, some at a time."""
    partition, offset = Partition(str(path), 0), 0
    numbers: list[int] = []
    records: list[Record] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                numbers.append(number)
                records.append(Record(partition, offset, offset + len(line), line))
            offset += len(line)
            if len(records) == READ_TOGETHER:
                yield numbers, records
                numbers, records = [], []
    if records:
        yield numbers, records


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turn a failure to write below `--out` into a SettingsError."""
    try:
        yield
    except OSError as error:
        raise SettingsError(f"--out={directory} cannot be written ({error}); name a writable directory") from error
