"""Ask the ledger: what became of a record, what a step decided, what a model was trained on.

A question reads the footers of all segments, which say what each group of rows can hold, and then only those groups. A
trainer that merges segments meanwhile takes away files under our hands: the question is then asked again.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stream_trainer.ledger.files import POSITION, SCHEMA, SUMMARY, hash_of, literal, trained_in
from stream_trainer.ledger.names import FOLDER, Segment, segments_in
from stream_trainer.records import Outcome

TRIES = 5

T = TypeVar("T")


@dataclass
class Found:
    """Rows that answer a question, as dictionaries by column.

    Attributes:
        more: whether there are others beyond the limit.
        groups_read: row groups that were read for it, those of indexes included.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    more: bool = False
    groups_read: int = 0


@dataclass(frozen=True)
class Trained:
    """What a model was trained on, of one partition."""

    topic: str
    partition: int
    records: int
    first: int
    last: int


def rows_where(directory: Path, equal: Mapping[str, Any], limit: int) -> Found:
    """Rows of the ledger in `directory` whose columns equal the values given. Raises OSError."""
    answer = _in_index if "id" in equal else _in_groups
    return _again_if_merged(lambda: _collect(directory, equal, limit, answer))


def _collect(
    directory: Path, equal: Mapping[str, Any], limit: int, answer: Callable[..., Iterator[dict[str, Any]]]
) -> Found:
    found = Found()
    for segment in segments_in(directory / FOLDER):
        for row in answer(segment, equal, found):
            if len(found.rows) == limit:
                found.more = True
                return found
            found.rows.append(row)
    return found


def _in_groups(segment: Segment, equal: Mapping[str, Any], found: Found) -> Iterator[dict[str, Any]]:
    return _matching(segment.path, equal, found)


def _in_index(segment: Segment, equal: Mapping[str, Any], found: Found) -> Iterator[dict[str, Any]]:
    if not segment.ids.exists():  # no sample of it has an id, which its statistics say too
        yield from _matching(segment.path, equal, found)
        return
    for at in _matching(segment.ids, {"hash": hash_of(equal["id"])}, found):
        yield from _matching(segment.path, {**equal, **{name: at[name] for name in POSITION}}, found)


def _matching(path: Path, equal: Mapping[str, Any], found: Found) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path) as file:
        columns = {name: file.schema_arrow.get_field_index(name) for name in equal}
        for i in range(file.num_row_groups):
            group = file.metadata.row_group(i)
            if all(_may_hold(group.column(columns[name]).statistics, value) for name, value in equal.items()):
                found.groups_read += 1
                asked = file.read_row_group(i, list(equal), use_threads=False)
                mask = reduce(pc.and_kleene, [pc.equal(asked[name], literal(value)) for name, value in equal.items()])
                if pc.any(mask).as_py():
                    yield from _as_dicts(file.read_row_group(i, use_threads=False).filter(mask))


def _as_dicts(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Rows by column. pyarrow would load pandas to make times of numbers, where that is installed."""
    if "time" not in table.column_names:  # of an index
        yield from table.to_pylist()
        return
    times = table["time"].cast(pa.int64()).to_pylist()
    for row, ms in zip(table.drop_columns("time").to_pylist(), times, strict=True):
        yield {**row, "time": datetime.fromtimestamp(ms / 1000, UTC)}


def _may_hold(statistics: Any, value: Any) -> bool:
    if statistics is None:
        return True
    if not statistics.has_min_max:
        return bool(statistics.num_values)
    return bool(statistics.min <= value <= statistics.max)


def trained_on(directory: Path, epoch: int, step: int) -> list[Trained]:
    """What the checkpoint of a step and an epoch was trained on, by partition. Raises OSError.

    Segments that it holds whole say so in their footers; of the others some columns are read, of the groups of rows
    that it can hold any of.
    """
    return _again_if_merged(lambda: _trained_on(directory, epoch, step))


def _trained_on(directory: Path, epoch: int, step: int) -> list[Trained]:
    known: dict[tuple[str, int], Trained] = {}
    for segment in segments_in(directory / FOLDER):
        for topic, partition, records, first, last in _trained_of(segment.path, epoch, step):
            before = known.get((topic, partition), Trained(topic, partition, 0, first, last))
            bounds = min(before.first, first), max(before.last, last)
            known[topic, partition] = Trained(topic, partition, before.records + records, *bounds)
    return [known[key] for key in sorted(known)]


def _trained_of(path: Path, epoch: int, step: int) -> list[Any]:
    with pq.ParquetFile(path) as file:
        limits = {"epoch": epoch, "checkpoint": step}
        bounds = [(_bounds(file, name), limit) for name, limit in limits.items()]
        if all(high <= limit for each, limit in bounds for _, high in each):
            return list(json.loads((file.schema_arrow.metadata or {})[SUMMARY]))
        groups = [i for i in range(file.num_row_groups) if all(each[i][0] <= limit for each, limit in bounds)]
        if not groups:
            return []
        table = file.read_row_groups(groups, [*POSITION, "outcome", *limits], use_threads=False)
    held = reduce(pc.and_, [pc.less_equal(table[name], literal(limit)) for name, limit in limits.items()])
    return list(trained_in(table.filter(held)))


def _bounds(file: Any, name: str) -> list[tuple[int, int]]:
    """Least and greatest value of a column in each group of rows."""
    column = SCHEMA.get_field_index(name)
    found = [file.metadata.row_group(i).column(column).statistics for i in range(file.num_row_groups)]
    return [(each.min, each.max) for each in found]


def redone(directory: Path, epoch: int, step: int) -> bool:
    """Whether a later trainer made steps up to that one again, so that the ledger speaks of these. Raises OSError."""

    def ask() -> bool:
        for segment in segments_in(directory / FOLDER):
            with pq.ParquetFile(segment.path) as file:
                newest = max(high for _, high in _bounds(file, "epoch"))
                if newest > epoch and min(low for low, _ in _bounds(file, "checkpoint")) < step:
                    table = file.read(["epoch", "step"], use_threads=False)
                    anew = pc.greater(table["epoch"], literal(epoch))
                    later = pc.and_kleene(anew, pc.less_equal(table["step"], literal(step)))
                    if pc.any(later).as_py():
                        return True
        return False

    return _again_if_merged(ask)


def holds(row: Mapping[str, Any], epoch: int, step: int) -> bool:
    """Whether the checkpoint of a step and an epoch was trained on the record of a row."""
    return bool(row["outcome"] == Outcome.TRAINED and row["epoch"] <= epoch and row["checkpoint"] <= step)


def _again_if_merged(ask: Callable[[], T]) -> T:
    """Ask, and once more where a segment that was listed is gone. Raises OSError, also for what is no Parquet file."""
    for tries_left in reversed(range(TRIES)):
        try:
            return ask()
        except FileNotFoundError:
            if not tries_left:
                raise
        except pa.ArrowInvalid as error:
            raise OSError(f"a segment is damaged: {error}") from error
    raise AssertionError("unreachable")
