"""The same samples in every format of a file that is read."""

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

Row = Mapping[str, Any]


def lines(rows: Sequence[Row]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write(form: str, folder: Path, rows: Sequence[Row], name: str = "samples") -> Path:
    """One of `FORMS`."""
    path = folder / f"{name}.{form}"
    match form:
        case "lines":
            path.write_bytes(lines(rows))
        case "gzip":
            path.write_bytes(gzip.compress(lines(rows)))
        case "utf-16":
            path.write_text(lines(rows).decode(), encoding="utf-16")
        case "array":
            path.write_text(json.dumps(list(rows), indent=1))
        case "gzip of an array in utf-16":
            path.write_bytes(gzip.compress(json.dumps(list(rows)).encode("utf-16-be")))
        case "parquet":
            parquet.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=3)
        case "dataset":
            import datasets

            datasets.disable_progress_bars()
            datasets.Dataset.from_list(list(rows)).save_to_disk(path, num_shards=min(2, len(rows)))
    return path


FORMS = ("gzip", "utf-16", "array", "gzip of an array in utf-16", "parquet", "dataset")

REFUSED = {
    "zip": (b"PK\x03\x04rest", "is a zip archive"),
    "zstd": (b"\x28\xb5\x2f\xfdrest", "is compressed with zstd"),
    "cut gzip": (gzip.compress(b'{"text": "a"}\n' * 1000)[:40], "is no whole gzip file"),
    "damaged parquet": (b"PAR1nothing", "cannot be read"),
    "cut array": (b'[{"text": "a"}, {"te', "is no whole JSON array"),
    "lines after an array": (b'[\n{"text": "a"}\n]\n{"text": "b"}\n', "goes on after its array"),
    "cut utf-16": ('{"text": "a"}'.encode("utf-16")[:-1], "is no utf-16"),
}
