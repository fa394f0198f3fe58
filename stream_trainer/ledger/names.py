"""The names in `<checkpoint.dir>/ledger/`, and which of its segments count.

    000000000000-000000004096.e3.parquet        decisions 0 to 4095 of the model's life, written in epoch 3
    ids/000000000000-000000004096.e3.parquet    where in that segment each `id` is

Decisions are numbered by the sum of the cursor's counts, which each of them raises by one. A checkpoint holds these
counts, so its number says which segments go with it, also where two checkpoints are of one step. A segment that lies
within a wider one has been merged into it, whether or not it is deleted yet.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

from stream_trainer.checkpoints.directory import TRAINER, checkpoints_in

FOLDER, IDS = "ledger", "ids"
NEEDS = "needs the module pyarrow; pip install 'stream-trainer[ledger]'"

_SEGMENT = re.compile(r"(\d{12,})-(\d{12,})\.e(\d+)\.parquet")


class Segment(NamedTuple):
    """Decisions from `first` on and below `end`, by the file's name."""

    first: int
    end: int
    epoch: int
    path: Path

    @property
    def rows(self) -> int:
        return self.end - self.first

    @property
    def ids(self) -> Path:
        """Its index of ids; there is none where no sample has one."""
        return self.path.parent / IDS / self.path.name


def name_of(first: int, end: int, epoch: int) -> str:
    """The name of a segment. Names sort as decisions were made."""
    return f"{first:012d}-{end:012d}.e{epoch}.parquet"


def all_in(folder: Path) -> list[Segment]:
    """All that are named as segments, wider ones before those within. Raises OSError."""
    if not folder.exists():
        return []
    matches = [(_SEGMENT.fullmatch(path.name), path) for path in folder.iterdir()]
    found = [Segment(int(match[1]), int(match[2]), int(match[3]), path) for match, path in matches if match]
    return sorted(found, key=lambda segment: (segment.first, -segment.end, -segment.epoch))


def segments_in(folder: Path) -> list[Segment]:
    """Those that count, in order. Raises OSError."""
    found: list[Segment] = []
    for segment in all_in(folder):
        if not found or segment.end > found[-1].end:
            found.append(segment)
    return found


def oldest_kept(directory: Path) -> int:
    """The decisions that every checkpoint of a directory holds; 0 if one cannot be read. Raises OSError."""
    totals = []
    for found in checkpoints_in(directory):
        try:
            counts = json.loads((found.path / TRAINER).read_text())["cursor"]["counts"]
            totals.append(sum(counts.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return 0
    return min(totals, default=0)
