"""Data in the layout that `benchmarks.learning --data` expects."""

import json
from pathlib import Path

import pytest

from benchmarks.learning.streams import DOMAINS, Data, read_data
from tests.helpers.learning import record


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Data in the layout that `--data` expects."""
    where = tmp_path / "data"
    sizes = {f"stream/{domain}": 40 for domain in DOMAINS} | {"target/math": 8, "test/math": 8, "test/roleplay": 8}
    for name, count in sizes.items():
        path = where / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record(name, i)) + "\n" for i in range(count)))
    return where


@pytest.fixture
def data(directory: Path) -> Data:
    return read_data(directory)
