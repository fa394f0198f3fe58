"""A ledger of many rows, as a long run would have left it, and how fast it answers.

    python -m tests.helpers.ledgers --rows 100000000

The rows go through what a trainer writes with, a merged segment at a time, so that no model is needed.
"""

import argparse
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from stream_trainer.checkpoints.ownership import Owner, claim
from stream_trainer.ledger.files import SCHEMA, put
from stream_trainer.ledger.names import FOLDER
from stream_trainer.ledger.query import Found, redone, rows_where, trained_on
from stream_trainer.ledger.tidy import LARGEST

TOPIC, PARTITIONS, POOL = "samples", 8, 64
FIRST_TIME_MS = 1_700_000_000_000
MAIN = "import sys; from stream_trainer.cli import main; sys.exit(main())"


def id_of(number: int) -> str:
    """The id of the sample of a decision."""
    return f"order-{number * 2654435761 % 2**32:08x}-{number}"


def position_of(number: int) -> tuple[int, int]:
    """Partition and offset of the record of a decision."""
    return number % PARTITIONS, number // PARTITIONS


def generate(directory: Path, rows: int, segment_rows: int = LARGEST) -> Owner:
    """Write a ledger of so many rows: steps of 64, a checkpoint each 200 steps."""
    owner = claim(directory)
    for first in range(0, rows, segment_rows):
        end = min(first + segment_rows, rows)
        put(directory, owner, first, end, _rows(first, end))
    return owner


def output_beside_pandas(folder: Path, code: str) -> str:
    """What a program prints where `folder` has a module in pandas' place, which prints `pandas` when asked for."""
    (folder / "pandas.py").write_text("print('pandas'); raise ImportError")
    paths = os.pathsep.join([str(folder), *filter(None, sys.path)])
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def _rows(first: int, end: int) -> pa.Table:
    numbers = np.arange(first, end)
    trained = numbers % 4 == 0
    checkpoints = (numbers // POOL // 200 + 1) * 200
    columns = {
        "topic": pa.array([TOPIC]).take(pa.array(np.zeros(len(numbers), dtype=np.int64))),
        "partition": numbers % PARTITIONS,
        "offset": numbers // PARTITIONS,
        "id": pa.array(list(map(id_of, range(first, end)))),
        "step": numbers // POOL + 1,
        "outcome": pa.array(["not_selected", "trained"]).take(pa.array(trained.astype(np.int64))),
        "coefficient": np.where(trained, (numbers % 97 + 1) / 97, 0.0).astype(np.float32),
        "reason": pa.nulls(len(numbers), pa.string()),
        "time": pa.array(FIRST_TIME_MS + numbers, pa.int64()).cast(SCHEMA.field("time").type),
        "epoch": np.ones(len(numbers), dtype=np.int32),
        "checkpoint": checkpoints,
        "until": checkpoints * POOL,
    }
    return pa.table([pa.array(columns[field.name]).cast(field.type) for field in SCHEMA], schema=SCHEMA)


def by_position(directory: Path, number: int) -> Found:
    partition, offset = position_of(number)
    return rows_where(directory, {"partition": partition, "offset": offset}, 20)


def by_id(directory: Path, number: int) -> Found:
    return rows_where(directory, {"id": id_of(number)}, 20)


def main() -> int:
    """Generate and measure. Returns the exit code: 0, or 1 if a question took longer than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", help="is left as it is then (default: a temporary one)")
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--limit-s", type=float, default=1.0, help="seconds that a question may take, in the median")
    options = parser.parse_args()
    if options.directory is not None:
        options.directory.mkdir(parents=True, exist_ok=True)
        return measure(options.directory, options.rows, options.limit_s)
    with tempfile.TemporaryDirectory(prefix="ledger-") as folder:
        return measure(Path(folder), options.rows, options.limit_s)


def measure(directory: Path, rows: int, limit_s: float) -> int:
    """Ask 20 questions of each kind about rows that are drawn by chance, and the command about one."""
    started = time.perf_counter()
    if not (directory / FOLDER).exists():
        generate(directory, rows)
    files = list((directory / FOLDER).rglob("*.parquet"))
    size = sum(path.stat().st_size for path in files)
    print(f"{rows} rows in {len(files)} files, {size / rows:.1f} bytes a row, {time.perf_counter() - started:.0f} s")
    chance = random.Random(0)
    numbers = [chance.randrange(rows) for _ in range(20)]
    medians = [
        _measure("by position", lambda number: by_position(directory, number).groups_read, numbers),
        _measure("by id", lambda number: by_id(directory, number).groups_read, numbers),
        _measure("by step", lambda n: rows_where(directory, {"step": n // POOL + 1}, POOL).groups_read, numbers),
        _measure("by version", lambda n: by_version(directory, n // POOL), numbers),
    ]
    partition, offset = position_of(numbers[0])
    asked = {
        "--id": [f"--id={id_of(numbers[0])}"],
        "--partition --offset": [f"--partition={partition}", f"--offset={offset}"],
    }
    for name, question in asked.items():
        wall, processor = _ask_command(directory, question)
        print(f"`ledger show {name}`, start of Python included: {wall:.2f} s, {processor:.2f} s of the processor")
    return 0 if max(medians) < limit_s else 1


def by_version(directory: Path, step: int) -> int:
    """Records that a version was trained on, and whether that is still so."""
    records = sum(each.records for each in trained_on(directory, 1, step))
    return 0 if redone(directory, 1, step) else records


def _measure(what: str, ask: Callable[[int], int], numbers: list[int]) -> float:
    """The median of the seconds."""
    seconds, answers = [], []
    for number in numbers:
        started = time.perf_counter()
        answers.append(ask(number))
        seconds.append(time.perf_counter() - started)
    print(
        f"{what:<12} first {seconds[0]:.3f} s, median {statistics.median(seconds):.3f} s, most {max(seconds):.3f} s; "
        f"answers such as {answers[0]}",
        flush=True,
    )
    return statistics.median(seconds)


def _ask_command(directory: Path, question: list[str]) -> tuple[float, float]:
    """Seconds of the wall and of the processor, the least of three times."""
    command = [sys.executable, "-c", MAIN, "ledger", "show", f"--dir={directory}", *question]
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    found = []
    for _ in range(3):
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | paths)
        wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append((wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
    return min(wall for wall, _ in found), min(processor for _, processor in found)


if __name__ == "__main__":
    sys.exit(main())
