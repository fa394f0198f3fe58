"""What the benchmarks share: results and what made them, progress, tables, and mistakes in one line."""

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from stream_trainer import __version__

CPU_INFO = Path("/proc/cpuinfo")
VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2"}  # the widest first


class OneLineParser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage, and ends with code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def at_least_one(text: str) -> int:
    """An option's count."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 1 or more")
    return value


def names_of(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """An option's list of names, each once."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is unknown; choose from {', '.join(known)}")
    return names


def writable_file(text: str) -> Path:
    """An option's path of a file to write; its directory must be there."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written; name a file in a directory that is there")
    return path


def machine() -> dict[str, Any]:
    """Processor, the widest vectors that it adds up (clouds hide its exact name), and operating system."""
    return {
        "cpu": _cpu_info("model name") or platform.processor() or platform.machine(),
        "vectors": next((name for flag, name in VECTORS.items() if flag in _cpu_info("flags").split()), None),
        "cores": os.cpu_count(),
        "system": platform.platform(),
    }


def _cpu_info(field: str) -> str:
    """What Linux says of the first core; empty elsewhere."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def say(text: str) -> None:
    """A line of progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{math.ceil(seconds / 60)} min"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first to the left and numbers to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    numeric = [all(row[i][:1].isdigit() or row[i] in ("-", "") for row in rows) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


def stamp() -> dict[str, Any]:
    """What made a result, when (UTC) and on what machine."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"version": __version__, "date": date, "machine": machine()}


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result with its stamp."""
    write_json(path, stamp() | result)


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write JSON, readable and without NaN, which JSON does not have."""
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
