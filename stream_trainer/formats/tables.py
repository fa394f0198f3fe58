"""Rows of Parquet files, and of what `datasets` saves on disk, as records of JSON. Needs pyarrow.

A dataset on disk is a folder with `state.json`, which names its Arrow files.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from stream_trainer.formats.as_json import as_json

STATE = "state.json"
SPLITS = "dataset_dict.json"
ROWS_TOGETHER = 1024


def rows_of_parquet(path: Path, start: int) -> Iterator[bytes]:
    """Rows from number `start` on. Raises ImportError, OSError, and ValueError for what is no Parquet file."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        yield from _from(file.iter_batches(batch_size=ROWS_TOGETHER), start)


def rows_of_dataset(folder: Path, start: int) -> Iterator[bytes]:
    """Rows from number `start` on. Raises ImportError, OSError, and ValueError for what is no dataset."""
    yield from _from(_batches(folder), start)


def _batches(folder: Path) -> Iterator[Any]:
    import pyarrow as pa

    for file in json.loads((folder / STATE).read_text())["_data_files"]:
        with pa.memory_map(str(folder / file["filename"])) as mapped, pa.ipc.open_stream(mapped) as batches:
            for batch in batches:
                # Its own may hold all rows of the file.
                for at in range(0, batch.num_rows, ROWS_TOGETHER):
                    yield batch.slice(at, ROWS_TOGETHER)


def _from(batches: Iterator[Any], start: int) -> Iterator[bytes]:
    """What lies before `start` is not made into values."""
    for batch in batches:
        skipped = min(start, batch.num_rows)
        start -= skipped
        if skipped < batch.num_rows:
            yield from map(as_json, batch.slice(skipped).to_pylist())
    if start:
        raise EndsBeforeError


class EndsBeforeError(Exception):
    """A file has fewer records than were to be passed over."""


def after(records: Iterator[bytes], start: int) -> Iterator[bytes]:
    """Records from number `start` on. Raises EndsBeforeError if there are fewer."""
    if sum(1 for _ in islice(records, start)) < start:
        raise EndsBeforeError
    yield from records
