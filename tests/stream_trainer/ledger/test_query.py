"""A question about one record reads a few groups of rows, however many there are."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from stream_trainer.ledger.files import GROUP_ROWS
from stream_trainer.ledger.names import FOLDER, segments_in
from stream_trainer.ledger.query import holds, redone, rows_where, trained_on
from tests.helpers import ledgers
from tests.helpers.ledgers import PARTITIONS, POOL, by_id, by_position, generate, id_of, position_of

ROWS, SEGMENTS = 1_000_000, 4
NUMBERS = (0, 1, 123_456, 250_000, 654_321, ROWS - 1)


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ledger")
    generate(directory, ROWS, ROWS // SEGMENTS)
    return directory


@pytest.mark.parametrize("number", NUMBERS)
def test_a_position_is_found_in_few_groups(ledger: Path, number: int) -> None:
    found = by_position(ledger, number)
    assert [(row["partition"], row["offset"], row["id"]) for row in found.rows] == [
        (*position_of(number), id_of(number))
    ]
    row = found.rows[0]
    assert row["step"] == number // POOL + 1
    assert row["outcome"] == ("trained" if number % 4 == 0 else "not_selected")
    # Groups that hold the end of a partition and the beginning of the next may hold any of their offsets.
    assert found.groups_read <= 3 < ROWS // GROUP_ROWS


@pytest.mark.parametrize("number", NUMBERS)
def test_an_id_is_found_in_a_group_of_each_index(ledger: Path, number: int) -> None:
    found = by_id(ledger, number)
    assert [row["id"] for row in found.rows] == [id_of(number)]
    assert found.groups_read <= SEGMENTS + 3


def test_what_is_not_there_is_not_found(ledger: Path) -> None:
    assert by_position(ledger, ROWS).rows == []
    assert by_position(ledger, ROWS).groups_read <= 2
    assert rows_where(ledger, {"id": "order-none"}, 20).rows == []
    assert rows_where(ledger, {"topic": "another", "partition": 0, "offset": 1}, 20).groups_read == 0
    assert rows_where(ledger / "nowhere", {"step": 1}, 20).rows == []


def test_a_step_is_found_with_all_that_it_decided(ledger: Path) -> None:
    found = rows_where(ledger, {"step": 4000}, POOL)
    numbers = sorted(row["offset"] * PARTITIONS + row["partition"] for row in found.rows)
    assert numbers == list(range(3999 * POOL, 4000 * POOL))
    assert not found.more
    first = rows_where(ledger, {"step": 4000}, 10)
    assert len(first.rows) == 10
    assert first.more


@pytest.mark.parametrize("step", [200, 3800, 4000, 20_000])
def test_what_a_checkpoint_was_trained_on_is_counted(ledger: Path, step: int) -> None:
    numbers = range(0, min(step * POOL, ROWS), 4)
    found = trained_on(ledger, 1, step)
    assert sum(each.records for each in found) == len(numbers)
    expected = {p: [n // PARTITIONS for n in numbers if n % PARTITIONS == p] for p in (0, 4)}
    bounds = {each.partition: (each.records, each.first, each.last) for each in found}
    assert bounds == {p: (len(offsets), offsets[0], offsets[-1]) for p, offsets in expected.items()}


def test_of_a_segment_only_what_a_checkpoint_can_hold_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    read = pq.ParquetFile.read_row_groups

    def noted(file: pq.ParquetFile, groups: list[int], *rest: Any, **options: Any) -> Any:
        asked.append(groups)
        return read(file, groups, *rest, **options)

    monkeypatch.setattr(ledgers, "PARTITIONS", 1)  # so that offsets, and with them groups, are in the order of steps
    generate(tmp_path, 3 * GROUP_ROWS)
    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", noted)
    (found,) = trained_on(tmp_path, 1, GROUP_ROWS // POOL + 100)
    assert asked == [[0, 1]]
    assert found.records == (GROUP_ROWS // POOL + 100) // 200 * 200 * POOL // 4


def test_a_checkpoint_of_before_holds_nothing_of_a_later_trainer(ledger: Path) -> None:
    assert trained_on(ledger, 0, 20_000) == []
    assert redone(ledger, 0, 20_000)
    assert not redone(ledger, 1, 20_000)
    row = by_position(ledger, 0).rows[0]
    assert holds(row, 1, 200)
    assert holds(row, 2, 400)
    assert not holds(row, 0, 400)
    assert not holds(row, 1, 199)
    assert not holds(row | {"outcome": "discarded"}, 1, 200)


def test_a_segment_that_is_merged_away_meanwhile_is_looked_for_again(
    ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = segments_in(ledger / FOLDER)
    answers = [[there[0]._replace(path=there[0].path.with_name("gone")), *there[1:]], there]
    monkeypatch.setattr("stream_trainer.ledger.query.segments_in", lambda _: answers.pop(0))
    assert len(by_position(ledger, 5).rows) == 1
    assert not answers


def test_a_damaged_segment_is_an_error_of_the_disk(tmp_path: Path) -> None:
    generate(tmp_path, 100)
    segment = segments_in(tmp_path / FOLDER)[0]
    segment.path.write_bytes(segment.path.read_bytes()[:-9])
    with pytest.raises(OSError, match="damaged"):
        by_position(tmp_path, 5)
