"""One segment of the ledger: a Parquet file sorted by position, and one beside it that finds ids.

Row groups are small and their statistics say which positions they hold, so a question reads one group of a file. Ids
come in any order: their index is sorted by a hash of the id. Both are written apart, made durable and renamed; the
index first, so that a segment that is there has its index.
"""

import hashlib
import json
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stream_trainer.checkpoints.directory import make_temporary
from stream_trainer.checkpoints.ownership import Owner
from stream_trainer.checkpoints.trouble import sync, sync_directory
from stream_trainer.ledger.names import FOLDER, IDS, name_of
from stream_trainer.records import Decided, Outcome, Partition

GROUP_ROWS = 32_768  # of a row group: read within milliseconds

# `step` and `coefficient` are null where no step decided. `epoch` and `checkpoint` name the first checkpoint that holds
# the decision, `until` is its number of decisions.
SCHEMA = pa.schema(
    [
        ("topic", pa.string()),
        ("partition", pa.int32()),
        ("offset", pa.int64()),
        ("id", pa.string()),
        ("step", pa.int64()),
        ("outcome", pa.string()),
        ("coefficient", pa.float32()),
        ("reason", pa.string()),
        ("time", pa.timestamp("ms", tz="+00:00")),
        ("epoch", pa.int32()),
        ("checkpoint", pa.int64()),
        ("until", pa.int64()),
    ]
)
POSITION = ("topic", "partition", "offset")
SUMMARY = b"stream_trainer.trained"  # in the file's metadata: trained records by partition: number, first, last offset
_REPEATED = ["topic", "partition", "outcome", "reason", "epoch", "checkpoint", "until", "step"]


def table_of(rows: Sequence[Decided], epoch: int, checkpoint: int, until: int) -> pa.Table:
    """Decisions that a checkpoint, by its step, is the first to hold."""
    columns = {
        "topic": [row.partition.topic for row in rows],
        "partition": [row.partition.number for row in rows],
        "offset": [row.offset for row in rows],
        "id": [row.id for row in rows],
        "step": [row.step for row in rows],
        "outcome": [row.outcome for row in rows],  # strings: asking each for its value takes ten times as long
        "coefficient": [row.coefficient for row in rows],
        "reason": [row.reason for row in rows],
        "time": [round(row.time * 1000) for row in rows],
        "epoch": [epoch] * len(rows),
        "checkpoint": [checkpoint] * len(rows),
        "until": [until] * len(rows),
    }
    return pa.table([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)


def rows_of(table: pa.Table) -> list[Decided]:
    """Inverse of `table_of`, in whatever order."""
    return [
        Decided(
            Partition(row["topic"], row["partition"]),
            row["offset"],
            Outcome(row["outcome"]),
            row["time"].timestamp(),
            row["id"],
            row["step"],
            row["coefficient"],
            row["reason"],
        )
        for row in table.to_pylist()
    ]


def read(path: Path) -> pa.Table:
    """All rows of a segment. Raises OSError."""
    with pq.ParquetFile(path) as file:
        return file.read(use_threads=False)


def put(directory: Path, owner: Owner, first: int, end: int, table: pa.Table, index: pa.Table | None = None) -> None:
    """Write the segment of some decisions durably, if `owner` still has `directory`.

    `index` is that of the table's ids, where it is known. Raises OSError, FencedError.
    """
    index = index_of(table) if index is None else index
    folder, name = directory / FOLDER, name_of(first, end, owner.epoch)
    if not (folder / IDS).exists():
        (folder / IDS).mkdir(parents=True, exist_ok=True)
        sync_directory(folder)
        sync_directory(directory)
    temporary = make_temporary(directory, owner.epoch, "ledger")  # which a successor takes away
    try:
        _write(temporary / name, table)
        if index.num_rows:
            _write_index(temporary / IDS, index)
        owner.confirm()
        if index.num_rows:
            (temporary / IDS).rename(folder / IDS / name)
            sync_directory(folder / IDS)
        (temporary / name).rename(folder / name)
        sync_directory(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(path: Path, table: pa.Table) -> None:
    table = table.sort_by([(name, "ascending") for name in POSITION])
    table = table.replace_schema_metadata({SUMMARY: json.dumps(trained_in(table))})
    pq.write_table(
        table,
        path,
        row_group_size=GROUP_ROWS,
        compression="zstd",
        use_dictionary=_REPEATED,
        column_encoding={"offset": "DELTA_BINARY_PACKED", "time": "DELTA_BINARY_PACKED"},
    )
    sync(path)


def index_of(table: pa.Table) -> pa.Table:
    """Where each id of a segment's rows is, by its hash."""
    table = table.filter(pc.is_valid(table["id"]))
    hashes = pa.array([hash_of(name) for name in table["id"].to_pylist()], pa.int64())
    return table.select(POSITION).append_column("hash", hashes)


def _write_index(path: Path, index: pa.Table) -> None:
    pq.write_table(
        index.sort_by("hash"),
        path,
        row_group_size=GROUP_ROWS,
        compression="zstd",
        use_dictionary=["topic", "partition"],
        column_encoding={"hash": "PLAIN", "offset": "DELTA_BINARY_PACKED"},
    )
    sync(path)


def hash_of(name: str) -> int:
    """64 bits by which an id is looked up: two of 100 million ids are alike once in some 4,000 ledgers."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big", signed=True)


def trained_in(table: pa.Table) -> list[list[object]]:
    """Topic, partition, number, first and last offset of the records that were trained on."""
    trained = table.filter(pc.equal(table["outcome"], literal(Outcome.TRAINED.value)))
    by = trained.group_by(["topic", "partition"], use_threads=False)
    found = by.aggregate([("offset", "count"), ("offset", "min"), ("offset", "max")])
    names = ("topic", "partition", "offset_count", "offset_min", "offset_max")
    return [[row[name] for name in names] for row in found.to_pylist()]


def literal(value: int | str) -> pa.Scalar:
    """A value that a column is compared with. `pa.scalar` would load pandas first, where that is installed."""
    if isinstance(value, int):
        return pa.Array.from_buffers(pa.int64(), 1, [None, pa.py_buffer(struct.pack("=q", value))])[0]
    text = value.encode()
    bounds = struct.pack("=ii", 0, len(text))
    return pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(bounds), pa.py_buffer(text)])[0]
