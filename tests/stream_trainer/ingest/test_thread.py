"""The ingest thread from a source in memory to the buffer: what comes out, what is decided, and what is told of it."""

import json
import time

import pytest

from stream_trainer.ingest.cursor import Cursor
from stream_trainer.monitoring.metrics import READING
from stream_trainer.records import Outcome, Partition, Record
from tests.helpers.fakes import LOG, ListDeadLetters, ListSource, records_of
from tests.helpers.service import wait_for
from tests.stream_trainer.ingest.service import UNLIMITED, Service, SlowSource, good, running


def test_what_was_decided_before_a_restart_is_skipped() -> None:
    records = records_of([b"{", good(1), b"{", good(3), good(4)])
    with running(Service(ListSource(records))) as first:
        first.take_all()
        first.cursor.resolve(LOG, 3, Outcome.TRAINED)
    cursor = Cursor.restore(first.cursor.state_dict())
    source = ListSource(records)
    with running(Service(source, cursor)) as second:
        assert [sample.id for sample in second.take_all()] == ["1", "4"]
    assert isinstance(second.dead_letters, ListDeadLetters)
    assert second.dead_letters.sent == []
    assert source.identity_at_start == {"log": "id-0"}
    assert cursor.counts[Outcome.DEAD_LETTERED] == 2


def test_reading_pauses_while_the_buffer_is_full_and_overshoots_by_a_chunk_at_most() -> None:
    service = Service(ListSource(records_of(map(good, range(1000)))), max_records=100)
    with running(service):
        wait_for(lambda: service.ingest.paused)
        assert service.source.paused
        wait_for(lambda: service.metric("reading_paused") == 1)
        assert 100 <= service.buffer.records < 100 + 64
        taken = service.take(90)
        wait_for(lambda: service.buffer.full)
        taken += service.take_all()
    assert [sample.offset for sample in taken] == list(range(1000))
    assert service.source.calls.count("pause") >= 2
    assert service.source.calls.count("resume") >= 1


def test_an_endless_stream_does_not_end_the_buffer() -> None:
    with running(Service(ListSource(records_of([good(0)]), finite=False))) as service:
        assert len(service.take(1)) == 1
        wait_for(lambda: service.metric("buffer_records") == 0)
        assert not service.buffer.ended
        assert service.ingest.identity == {"log": "id-1"}


def test_commits_reach_the_source_and_the_newest_is_made_before_it_closes() -> None:
    service = Service(ListSource(records_of([good(0)])))
    with running(service):
        service.take_all()
        service.ingest.request_commit({LOG: 1, Partition("left behind", 0): 9}, 10)
        wait_for(lambda: len(service.source.commits) == 1)
        service.ingest.request_commit({LOG: 1}, 20)
        service.ingest.request_commit({LOG: 1}, 30)
    assert service.source.commits[0] == ({LOG: 1}, 10)
    assert service.source.commits[-1] == ({LOG: 1}, 30)
    assert service.source.calls[-2:] == ["commit", "close"]
    service.ingest.stop()
    assert service.source.calls[-2:] == ["commit", "close"]


def test_the_place_in_a_partition_without_records_is_kept() -> None:
    """Else a start at the latest record would, after a restart, pass over what arrived meanwhile."""
    empty = Cursor()
    empty.begin({LOG: 40})
    source = ListSource(records_of([good(0)], first=40), finite=False)
    with running(Service(source, empty)) as service:
        wait_for(lambda: service.cursor.positions() == {LOG: 40})
        assert service.take(1)[0].offset == 40


def test_lag_is_what_is_not_decided() -> None:
    source = ListSource(records_of(map(good, range(7))), finite=False)
    cursor = Cursor()
    cursor.begin({LOG: 2})
    with running(Service(source, cursor)) as service:
        wait_for(lambda: service.metric("lag_records", topic="log", partition="0") is not None)
    assert service.metric("lag_records", topic="log", partition="0") == 5


def test_records_that_the_stream_never_returns_do_not_hold_the_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transaction leaves control records, which retention removes like others: a cursor on one would look lost."""
    monkeypatch.setattr("stream_trainer.ingest.thread.LAG_INTERVAL_S", 0.01)
    with running(Service(ListSource(records_of([b"{", good(1)]), finite=False, hidden=2))) as service:
        service.take(1)
        assert service.cursor.positions() == {LOG: 1}
        service.cursor.resolve(LOG, 1, Outcome.TRAINED)
        wait_for(lambda: service.cursor.positions() == {LOG: 4})
        wait_for(lambda: service.metric("lag_records", topic="log", partition="0") == 0)


def test_a_stop_does_not_wait_for_what_was_read() -> None:
    value = json.dumps({"text": "a" * 4000}).encode()
    service = Service(
        ListSource([Record(LOG, n, n + 1, value) for n in range(20_000)], batch=20_000), max_records=20_000
    )
    with running(service):
        wait_for(lambda: service.buffer.records > 0)
        service.ingest.stop()
        assert service.buffer.records < 20_000


def test_stop_without_start_closes_the_source() -> None:
    service = Service(ListSource([]))
    service.ingest.stop()
    assert service.source.calls == ["close"]


def test_nothing_is_decided_after_reading_has_stopped() -> None:
    """A snapshot taken then is the last word: no record is dead-lettered again after a restart."""
    source, letters = SlowSource(records_of([b"{"] * 5000), batch=10, finite=False), ListDeadLetters()
    with running(Service(source, dead_letters=letters, limits=UNLIMITED)) as service:
        wait_for(lambda: service.cursor.counts[Outcome.DEAD_LETTERED] > 0)
        service.ingest.stop_reading()
        counts, sent = dict(service.cursor.counts), len(letters.sent)
        service.ingest.request_commit({LOG: 1}, step=1)
        wait_for(lambda: bool(source.commits))
        assert dict(service.cursor.counts) == counts
        assert len(letters.sent) == sent < 5000


def test_every_moment_of_the_thread_is_told_by_what_it_did() -> None:
    begun = time.perf_counter()
    with running(Service(ListSource(records_of(map(good, range(300))), finite=False), max_records=100)) as service:
        wait_for(lambda: (service.metric("reading_seconds_total", activity="hold") or 0) > 0.02)
        spent = [service.metric("reading_seconds_total", activity=name) or 0 for name in READING]
        assert sum(spent) <= time.perf_counter() - begun
        assert service.metric("reading_seconds_total", activity="decode")
    with running(Service(ListSource(records_of([good(0)]), finite=False))) as service:
        wait_for(lambda: (service.metric("reading_seconds_total", activity="wait") or 0) > 0.02)
        assert service.metric("reading_seconds_total", activity="hold") == 0


def test_time_until_retention_reaches_the_cursor_is_exported() -> None:
    now = time.time()
    source = ListSource([Record(LOG, n, n + 1, good(n), timestamp=now - 600) for n in range(3)], finite=False)
    source.retention_s = 1000.0
    with running(Service(source)) as service:
        service.take(3)
        service.ingest._lag_due = 0.0
        wait_for(lambda: service.metric("retention_remaining_seconds", topic="log", partition="0") is not None)
        assert 340 < (service.metric("retention_remaining_seconds", topic="log", partition="0") or 0) <= 400
        for offset in range(3):
            service.cursor.resolve(LOG, offset, Outcome.TRAINED)
        service.ingest._lag_due = 0.0
        wait_for(lambda: service.metric("retention_remaining_seconds", topic="log", partition="0") == 1000)


def test_a_source_that_keeps_no_time_has_no_retention() -> None:
    with running(Service(ListSource(records_of([good(0)])))) as service:
        service.take_all()
        assert service.metric("retention_remaining_seconds", topic="log", partition="0") is None
