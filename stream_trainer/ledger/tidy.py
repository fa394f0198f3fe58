"""Keep the ledger in order: drop what no checkpoint holds, merge small segments, prune old ones.

Segments are only merged where every checkpoint holds all of them, so that a resume from any drops whole segments. Where
a person brings back an older checkpoint than that, the segment that reaches beyond it is written anew without the rest.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stream_trainer.checkpoints.ownership import Owner
from stream_trainer.ledger.files import SCHEMA, put, read
from stream_trainer.ledger.names import FOLDER, IDS, Segment, all_in, oldest_kept, segments_in

FAN = 16  # segments that are merged into one
LARGEST = 1 << 20  # rows of a segment that is merged no more: a merge takes a second or two
DAY_S = 86400.0


def drop_after(directory: Path, owner: Owner, total: int) -> int:
    """Drop all decisions from number `total` on. Returns how many. Raises OSError, FencedError."""
    gone = 0
    for segment in segments_in(directory / FOLDER):
        if segment.end <= total:
            continue
        if segment.first < total:
            table = read(segment.path)
            table = table.filter(pc.less_equal(table["until"], total))
            if table.num_rows:
                put(directory, owner, segment.first, total, table)
        gone += segment.end - max(segment.first, total)
        delete(segment)
    return gone


def clear(directory: Path) -> None:
    """Delete what was left when a merge was broken off. Raises OSError."""
    folder = directory / FOLDER
    counting = segments_in(folder)
    for segment in all_in(folder):
        if segment not in counting:
            delete(segment)
    if (folder / IDS).exists():
        names = {segment.path.name for segment in counting}
        for path in (folder / IDS).iterdir():
            if path.name not in names:
                path.unlink()


def delete(segment: Segment) -> None:
    """Delete a segment, then its index. Raises OSError."""
    for path in (segment.path, segment.ids):
        path.unlink(missing_ok=True)


def merge(directory: Path, owner: Owner) -> bool:
    """Merge some neighbours, if there are so many. Raises OSError, FencedError."""
    segments = segments_in(directory / FOLDER)
    if not choose(segments):
        return False
    held = oldest_kept(directory)
    chosen = choose([segment for segment in segments if segment.end <= held])
    if not chosen:
        return False
    table = pa.concat_tables([read(segment.path).cast(SCHEMA) for segment in chosen])
    indexes = [read(segment.ids) for segment in chosen if segment.ids.exists()]
    index = pa.concat_tables(indexes) if indexes else None
    put(directory, owner, chosen[0].first, chosen[-1].end, table, index)
    for segment in chosen:
        delete(segment)
    return True


def choose(segments: Sequence[Segment]) -> list[Segment]:
    """The oldest `FAN` neighbours of about one size, smaller ones among them, beginning with the smallest sizes."""
    limit = FAN
    while limit <= LARGEST:
        run: list[Segment] = []
        for segment in segments:
            if segment.rows > limit:
                run = []
            elif run and segment.first != run[-1].end:
                run = [segment]
            else:
                run.append(segment)
            if len(run) == FAN:
                return run
        limit *= FAN
    return []


def prune(directory: Path, keep_days: float) -> int:
    """Delete segments whose every row is older, from the oldest on. Returns how many. Raises OSError."""
    limit, gone = datetime.fromtimestamp(time.time() - keep_days * DAY_S, UTC), 0
    for segment in segments_in(directory / FOLDER):
        newest = newest_in(segment.path)
        if newest is None or newest >= limit:
            break
        delete(segment)
        gone += 1
    return gone


def newest_in(path: Path) -> datetime | None:
    """The time of a segment's newest decision, from its statistics. Raises OSError."""
    with suppress(pa.ArrowInvalid), pq.ParquetFile(path) as file:
        column = SCHEMA.get_field_index("time")
        groups = [file.metadata.row_group(i).column(column).statistics for i in range(file.num_row_groups)]
        return max((found.max for found in groups if found is not None and found.has_min_max), default=None)
    return None
