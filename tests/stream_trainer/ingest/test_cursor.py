"""The cursor against a naive model: any order of decisions, any number of restarts, each record exactly once."""

import json
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stream_trainer.ingest.cursor import Cursor
from stream_trainer.records import Outcome, Partition

LOG = Partition("topic:with:colons", 3)


def read(cursor: Cursor, offsets: list[int]) -> list[int]:
    """Fetch records of length 1; return those that are not decided yet."""
    return [offset for offset in offsets if cursor.fetched(LOG, offset, offset + 1)]


def test_position_is_the_lowest_undecided_record() -> None:
    cursor = Cursor()
    read(cursor, [10, 12, 15])
    cursor.resolve(LOG, 12, Outcome.TRAINED)
    assert cursor.positions() == {LOG: 10}
    cursor.resolve(LOG, 10, Outcome.FILTERED)
    assert cursor.positions() == {LOG: 15}
    cursor.resolve(LOG, 15, Outcome.TRAINED)
    assert cursor.positions() == {LOG: 16}
    assert cursor.counts == {
        Outcome.TRAINED: 2,
        Outcome.NOT_SELECTED: 0,
        Outcome.FILTERED: 1,
        Outcome.DEAD_LETTERED: 0,
        Outcome.DISCARDED: 0,
        Outcome.DUPLICATE: 0,
    }


def test_a_rollback_moves_counts_and_no_position() -> None:
    cursor = Cursor()
    read(cursor, list(range(8)))
    for offset, outcome in enumerate((Outcome.TRAINED, Outcome.FILTERED, Outcome.NOT_SELECTED)):
        cursor.resolve(LOG, offset, outcome)
    before = cursor.state_dict()["counts"]
    later = (Outcome.TRAINED, Outcome.NOT_SELECTED, Outcome.DEAD_LETTERED, Outcome.TRAINED)
    for offset, outcome in enumerate(later, start=3):
        cursor.resolve(LOG, offset, outcome)
    assert cursor.discard(before) == 3
    assert cursor.discard(before) == 0
    assert cursor.positions() == {LOG: 7}
    assert [cursor.counts[outcome] for outcome in Outcome] == [1, 1, 1, 0, 1, 3]
    assert Cursor.restore(cursor.state_dict()).counts == cursor.counts
    assert Cursor.restore({"partitions": {}, "counts": {"trained": 2}}).counts[Outcome.DISCARDED] == 0  # an older one


def test_a_gap_between_decided_records_does_not_split_their_interval() -> None:
    cursor = Cursor()
    read(cursor, [0, 5, 9, 10])
    for offset in (5, 9, 10):
        cursor.resolve(LOG, offset, Outcome.TRAINED)
    assert cursor.state_dict()["partitions"] == {str(LOG): {"next": 0, "decided": [[5, 11]]}}


def test_counts_survive_a_restart_and_skipped_records_are_not_counted_again() -> None:
    cursor = Cursor()
    read(cursor, [0, 1])
    cursor.resolve(LOG, 1, Outcome.DEAD_LETTERED)
    cursor = Cursor.restore(json.loads(json.dumps(cursor.state_dict())))
    assert read(cursor, [0, 1]) == [0]
    assert cursor.counts[Outcome.DEAD_LETTERED] == 1


def test_a_snapshot_before_everything_is_read_again_keeps_what_was_decided() -> None:
    cursor = Cursor()
    read(cursor, [0, 1, 2, 3])
    cursor.resolve(LOG, 1, Outcome.TRAINED)
    cursor.resolve(LOG, 2, Outcome.TRAINED)
    again = Cursor.restore(cursor.state_dict())
    assert read(again, [0, 1]) == [0]
    once_more = Cursor.restore(again.state_dict())
    assert read(once_more, [0, 1, 2, 3]) == [0, 3]


def test_begin_keeps_the_place_in_a_partition_without_records() -> None:
    cursor = Cursor()
    cursor.begin({LOG: 40})
    assert Cursor.restore(cursor.state_dict()).positions() == {LOG: 40}


def test_begin_keeps_what_was_decided_unless_the_log_was_made_anew() -> None:
    cursor = Cursor()
    read(cursor, [10, 11, 12])
    cursor.resolve(LOG, 11, Outcome.TRAINED)
    snapshot = cursor.state_dict()
    for begin, expected in [(10, [10, 12]), (11, [12]), (9, [10, 11, 12])]:
        cursor = Cursor.restore(snapshot)
        cursor.begin({LOG: begin})
        assert read(cursor, [offset for offset in (10, 11, 12) if offset >= begin]) == expected


def test_begin_forgets_partitions_that_are_not_read_any_more() -> None:
    cursor = Cursor()
    read(cursor, [0])
    cursor.begin({Partition("other", 0): 5})
    assert cursor.positions() == {Partition("other", 0): 5}


def test_reached_passes_control_records_but_no_undecided_one() -> None:
    cursor = Cursor()
    read(cursor, [40])
    cursor.reached(LOG, 43)
    assert cursor.positions() == {LOG: 40}
    cursor.resolve(LOG, 40, Outcome.TRAINED)
    assert cursor.positions() == {LOG: 43}


@pytest.mark.parametrize("offset", [0, 1, 2], ids=["decided", "gone", "unknown"])
def test_resolving_what_is_not_undecided_is_an_assertion_error(offset: int) -> None:
    cursor = Cursor()
    read(cursor, [0, 1])
    cursor.resolve(LOG, 1, Outcome.TRAINED)
    if offset == 0:
        cursor.resolve(LOG, 0, Outcome.TRAINED)
    with pytest.raises(AssertionError):
        cursor.resolve(LOG, offset, Outcome.TRAINED)
    with pytest.raises(AssertionError):
        cursor.resolve(Partition("elsewhere", 0), offset, Outcome.TRAINED)


def test_reading_backwards_is_an_assertion_error() -> None:
    cursor = Cursor()
    read(cursor, [5])
    with pytest.raises(AssertionError):
        cursor.fetched(LOG, 4, 5)


def test_both_threads_may_use_it() -> None:
    cursor = Cursor()
    read(cursor, list(range(2000)))
    halves = [range(0, 2000, 2), range(1, 2000, 2)]

    def resolve(offsets: range) -> None:
        for offset in offsets:
            cursor.resolve(LOG, offset, Outcome.TRAINED)

    threads = [threading.Thread(target=resolve, args=(half,)) for half in halves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cursor.positions() == {LOG: 2000}
    assert cursor.counts[Outcome.TRAINED] == 2000


# Two logs of records, (offset, next_offset), as gaps and lengths produce them.
logs = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=25)


def records_of(spacing: list[tuple[int, int]]) -> list[tuple[int, int]]:
    records, end = [], 0
    for gap, length in spacing:
        records.append((end + gap, end + gap + length))
        end += gap + length
    return records


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.tuples(logs, logs), st.data())
def test_each_record_is_decided_exactly_once_whatever_happens(
    spacings: tuple[list[tuple[int, int]], list[tuple[int, int]]], data: st.DataObject
) -> None:
    """The model: a list of records per log, a set of decided ones, and a restart to the last snapshot at any time."""
    records = {Partition("log", number): records_of(spacing) for number, spacing in enumerate(spacings)}
    cursor, position = Cursor(), dict.fromkeys(records, 0)
    decided: set[tuple[Partition, int]] = set()
    waiting: list[tuple[Partition, int]] = []
    kept = (json.dumps(cursor.state_dict()), frozenset(decided))
    total = sum(map(len, records.values()))
    for action in data.draw(st.lists(st.sampled_from(["read", "decide", "keep", "restart"]), max_size=80)):
        if action == "read":
            log = data.draw(st.sampled_from(list(records)))
            for offset, end in [r for r in records[log] if r[0] >= position[log]][:1]:
                assert cursor.fetched(log, offset, end) == ((log, offset) not in decided)
                position[log] = end
                if (log, offset) not in decided:
                    waiting.append((log, offset))
        elif action == "decide" and waiting:
            choice = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
            cursor.resolve(*choice, data.draw(st.sampled_from(list(Outcome))))
            decided.add(choice)
        elif action == "keep":
            kept = (json.dumps(cursor.state_dict()), frozenset(decided))
        elif action == "restart":
            cursor, decided, waiting = Cursor.restore(json.loads(kept[0])), set(kept[1]), []
            position = {log: cursor.positions().get(log, 0) for log in records}
        for log, place in cursor.positions().items():
            undecided = [offset for offset, _ in records[log] if (log, offset) not in decided]
            assert all(offset >= place for offset in undecided)
            assert place == min([*(o for p, o in waiting if p == log), position[log]])
        assert sum(cursor.counts.values()) == len(decided) <= total


def test_the_mark_of_the_highest_decided_record_is_kept() -> None:
    cursor = Cursor()
    for offset in range(4):
        cursor.fetched(LOG, offset, offset + 1, f"mark {offset}")
    assert cursor.marks == {}
    cursor.resolve(LOG, 2, Outcome.TRAINED)
    cursor.resolve(LOG, 0, Outcome.TRAINED)
    again = Cursor.restore(json.loads(json.dumps(cursor.state_dict())))
    assert again.marks == {LOG: (2, "mark 2")}
    again.fetched(LOG, 1, 2, "mark 1")
    again.resolve(LOG, 1, Outcome.TRAINED)
    assert again.marks == {LOG: (2, "mark 2")}


def test_what_was_decided_in_a_log_that_was_replaced_says_nothing() -> None:
    cursor = Cursor()
    read(cursor, list(range(10)))
    for offset in (4, 5, 6, 7):
        cursor.resolve(LOG, offset, Outcome.TRAINED)
    again = Cursor.restore(cursor.state_dict())
    again.begin({LOG: 0}, {LOG: 6})
    assert read(again, list(range(10))) == [0, 1, 2, 3, 6, 7, 8, 9]


def test_a_checkpoint_without_an_order_can_be_read() -> None:
    cursor = Cursor()
    read(cursor, [0, 1, 2])
    cursor.resolve(LOG, 1, Outcome.TRAINED)
    older = {name: value for name, value in cursor.state_dict().items() if name in ("partitions", "counts")}
    assert read(Cursor.restore(older), [0, 1, 2]) == [0, 2]
