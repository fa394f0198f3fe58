"""The ingest thread from a source in memory to the buffer: what comes out, what is decided, and how it fails."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from gradient_selectors.state import load_states

from stream_trainer.errors import FencedError, PoisonError, SourceAwayError, SourceError
from stream_trainer.ingest.buffer import Buffer
from stream_trainer.ingest.cursor import Cursor
from stream_trainer.ingest.letter import read_dead_letters
from stream_trainer.ingest.letter_file import FileDeadLetters
from stream_trainer.ingest.thread import Ingest
from stream_trainer.monitoring.metrics import READING, Metrics
from stream_trainer.records import Outcome, Partition, Record, Sample
from stream_trainer.samples.byte_tokenizer import byte_tokenizer
from stream_trainer.samples.decoder import REASONS, Decoder
from stream_trainer.settings.schema import BufferSettings, DeadLetterSettings, SampleSettings
from stream_trainer.sources.base import Source
from tests.helpers.fakes import LOG, ListDeadLetters, ListSource, records_of
from tests.helpers.malformed import malformed, malformed_values

DECODER = Decoder(byte_tokenizer(), SampleSettings(max_tokens=64, max_bytes=5000))
LONG_S = 60.0
UNLIMITED = DeadLetterSettings(max_ratio=None, max_in_a_row=None)


class Service:
    """An ingest thread and everything around it."""

    def __init__(
        self,
        source: Source,
        cursor: Cursor | None = None,
        dead_letters: ListDeadLetters | FileDeadLetters | None = None,
        max_records: int = 512,
        limits: DeadLetterSettings | None = None,
    ) -> None:
        self.source: Any = source
        self.cursor = cursor or Cursor()
        self.dead_letters = dead_letters or ListDeadLetters()
        self.buffer = Buffer(BufferSettings(max_records=max_records))
        self.metrics = Metrics(REASONS)
        self.metrics.count_outcomes(lambda: self.cursor.counts)
        limits = limits or UNLIMITED  # a stream of bad records alone is what many of these tests want
        self.ingest = Ingest(source, DECODER, self.dead_letters, self.cursor, self.buffer, self.metrics, limits)

    def take(self, n: int) -> list[Sample]:
        return self.buffer.take(n, LONG_S, lambda: False)

    def take_all(self) -> list[Sample]:
        taken: list[Sample] = []
        while samples := self.take(100):
            taken += samples
        return taken

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"stream_trainer_{name}", labels)


@contextmanager
def running(service: Service) -> Iterator[Service]:
    service.ingest.start(service.cursor.positions(), {"log": "id-0"})
    try:
        yield service
    finally:
        service.ingest.stop()
    assert not service.ingest.alive


def test_a_stream_that_ends_without_one_sample_is_an_error() -> None:
    service = Service(ListSource(records_of([b"no", b"no"])), limits=DeadLetterSettings())
    with running(service), pytest.raises(PoisonError, match="all 2 last records of the stream cannot be used"):
        service.take_all()
    assert service.cursor.counts[Outcome.DEAD_LETTERED] == 2


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def good(number: int) -> bytes:
    return json.dumps({"id": number, "text": f"sample {number}"}).encode()


def test_ten_thousand_malformed_records_stop_nothing_and_none_vanishes(tmp_path: Path) -> None:
    bad = malformed(10_000, max_bytes=5000)
    assert len({kind for kind, _ in bad}) >= 20
    values: list[bytes | None] = [value for number in range(10_000) for value in (bad[number][1], good(number))]
    path = tmp_path / "dead.jsonl"
    letters = FileDeadLetters(path)
    service = Service(ListSource(records_of(values)), dead_letters=letters)
    with running(service):
        samples = service.take_all()
        assert service.ingest.alive
        for sample in samples:
            service.cursor.resolve(sample.partition, sample.offset, Outcome.TRAINED)
    letters.close()
    assert [sample.id for sample in samples] == [str(number) for number in range(10_000)]
    kept = list(read_dead_letters(path))
    assert [letter.record.value for letter in kept] == [value for _, value in bad]
    assert [letter.record.offset for letter in kept] == list(range(0, 20_000, 2))
    assert {letter.reason for letter in kept} <= set(REASONS) - {"unexpected"}
    assert service.cursor.counts == {
        Outcome.TRAINED: 10_000,
        Outcome.NOT_SELECTED: 0,
        Outcome.FILTERED: 0,
        Outcome.DEAD_LETTERED: 10_000,
        Outcome.DISCARDED: 0,
        Outcome.DUPLICATE: 0,
    }
    assert service.cursor.positions() == {LOG: 20_000}
    assert service.metric("records_total", outcome="dead_lettered") == 10_000
    assert sum(service.metric("dead_letters_total", reason=reason) or 0 for reason in REASONS) == 10_000
    assert service.metric("records_read_total") == 20_000
    assert service.metric("read_bytes_total") == sum(len(value) for value in values if value is not None)


def test_every_malformed_kind_is_told_once_in_the_log_without_its_content(caplog: pytest.LogCaptureFixture) -> None:
    values: list[bytes | None] = [b'{"text": "secret", "text": "secret"}'] * 3
    with running(Service(ListSource(records_of(values)))) as service:
        assert service.take_all() == []
    assert caplog.text.count("is dead-lettered (bad_json") == 1
    assert "secret" not in caplog.text


def test_a_tombstone_is_filtered() -> None:
    with running(Service(ListSource(records_of([None, good(1)])))) as service:
        assert [sample.id for sample in service.take_all()] == ["1"]
    assert service.cursor.counts[Outcome.FILTERED] == 1
    assert service.metric("records_total", outcome="filtered") == 1
    assert service.cursor.positions() == {LOG: 1}


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


def test_a_failed_commit_is_counted_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    service = Service(ListSource(records_of([good(0)]), finite=False))
    service.source.fail_commits = RuntimeError("the group is in use")
    with running(service):
        for step in (1, 2):
            service.ingest.request_commit({LOG: 0}, step)
            wait_for(lambda step=step: service.metric("commit_failures_total") == step)  # type: ignore[misc]
        assert service.ingest.alive
    assert caplog.text.count("could not be committed") == 1


def test_a_source_that_fails_fails_the_trainer_and_is_closed() -> None:
    service = Service(ListSource(records_of([good(0)])))
    service.source.fail_with = SourceError("the brokers are gone")
    with running(service), pytest.raises(SourceError, match="the brokers are gone"):
        service.take(1)
    assert service.source.calls[-1] == "close"


def test_a_dead_letter_that_cannot_be_kept_fails_the_trainer_and_stays_undecided() -> None:
    letters = ListDeadLetters(fail_with=SourceError("disk full"))
    service = Service(ListSource(records_of([b"{"])), dead_letters=letters)
    with running(service), pytest.raises(SourceError, match="disk full"):
        service.take(1)
    assert service.cursor.positions() == {LOG: 0}
    assert service.cursor.counts[Outcome.DEAD_LETTERED] == 0


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


def test_an_unknown_lag_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream_trainer.ingest.thread.LAG_INTERVAL_S", 0.0)
    source = ListSource(records_of(map(good, range(10))), batch=1)
    source.fail_ends = True
    with running(Service(source)) as service:
        assert len(service.take_all()) == 10


def test_records_lost_are_counted_once() -> None:
    source = ListSource(records_of([good(0)]), finite=False)
    source.records_lost = 3
    with running(Service(source)) as service:
        wait_for(lambda: service.metric("records_lost_total") == 3)


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


def test_the_generator_of_malformed_values_has_a_line_for_each() -> None:
    values = malformed_values(5000)
    assert len(dict(values)) == len(values)
    assert not any(b"\n" in value for _, value in values)


class SlowSource(ListSource):
    """Lets other threads have their turn between two polls: one that never waits may be done before they look."""

    def poll(self, timeout_s: float) -> list[Record]:
        time.sleep(0.01)
        return super().poll(timeout_s)


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


def test_a_letter_that_is_held_leaves_its_record_undecided_and_the_stream_open() -> None:
    letters = ListDeadLetters(refusing=True)
    with running(Service(ListSource(records_of([good(0), b"{", good(2)])), dead_letters=letters)) as service:
        assert [sample.id for sample in service.take(2)] == ["0", "2"]
        for offset in (0, 2):
            service.cursor.resolve(LOG, offset, Outcome.TRAINED)
        snapshot = service.ingest.snapshot()
        assert snapshot.cursor["partitions"]["log:0"] == {"next": 1, "decided": [[2, 3]]}
        assert snapshot.counts[Outcome.DEAD_LETTERED] == 0
        wait_for(lambda: service.metric("dead_letters_held") == 1)
        assert not service.buffer.ended
        letters.refusing = False
        wait_for(lambda: service.buffer.ended)
        assert service.metric("dead_letters_held") == 0
    assert service.cursor.positions() == {LOG: 3}
    assert service.metric("dead_letters_total", reason="bad_json") == 1


def test_reading_pauses_while_too_many_letters_are_held() -> None:
    letters = ListDeadLetters(full=True)
    with running(Service(ListSource(records_of([good(0)])), dead_letters=letters)) as service:
        wait_for(lambda: service.metric("reading_paused") == 1)
        assert service.buffer.records == 0
        letters.full = False
        assert [sample.id for sample in service.take_all()] == ["0"]


def test_a_snapshot_agrees_with_the_file_while_letters_are_written(tmp_path: Path) -> None:
    """Letters that the cursor counts are in the file below the stored length, and no others are."""
    path = tmp_path / "dead.jsonl"
    letters = FileDeadLetters(path)
    source = SlowSource(records_of([b"{"] * 2000), batch=20, finite=False)
    service = Service(source, dead_letters=letters, limits=UNLIMITED)
    with running(service):
        seen = 0
        while seen < 1500:
            snapshot = service.ingest.snapshot()
            seen = snapshot.counts[Outcome.DEAD_LETTERED]
            kept = path.read_bytes()[: snapshot.parts["dead_letters"]["length"]].splitlines()
            assert len(kept) == seen
            last = snapshot.parts["dead_letters"]["last"]
            assert last == (f"log:0:{seen - 1}" if seen else None)
    letters.close()


def test_a_poisoned_stream_ends_the_run_and_can_still_be_committed() -> None:
    source = ListSource(records_of([good(0), *[b"{"] * 3000]))
    with running(Service(source, limits=DeadLetterSettings())) as service:
        with pytest.raises(PoisonError, match="999 of the last 1000 records cannot be used, 999 of them for bad_json"):
            service.take(2)
        service.ingest.stop_reading()
        snapshot = service.ingest.snapshot()
        assert 999 <= snapshot.counts[Outcome.DEAD_LETTERED] <= 1064
        service.ingest.request_commit({LOG: 0}, step=1)
        wait_for(lambda: bool(source.commits))


def test_the_watch_is_restored_with_the_cursor() -> None:
    values: list[bytes | None] = [b"{"] * 999
    with running(Service(ListSource(records_of(values)))) as first:
        assert first.take_all() == []
        snapshot = first.ingest.snapshot()
    again = Service(
        ListSource(records_of([*values, b"{"])), Cursor.restore(snapshot.cursor), limits=DeadLetterSettings()
    )
    load_states(again.ingest.parts, snapshot.parts)
    with running(again), pytest.raises(PoisonError, match="1000 records in a row"):
        again.take(1)


def test_what_was_read_before_a_source_failed_is_taken_first() -> None:
    """Else good records that are read already would be lost with whatever the error tells to delete."""

    class BreakingSource(ListSource):
        def poll(self, timeout_s: float) -> list[Record]:
            if ready := super().poll(timeout_s):
                return ready
            raise SourceError("the next batch is damaged")

    with running(Service(BreakingSource(records_of(map(good, range(200))), finite=False))) as service:
        assert [sample.offset for sample in service.take(150)] == list(range(150))
        assert [sample.offset for sample in service.take(150)] == list(range(150, 200))
        with pytest.raises(SourceError, match="the next batch is damaged"):
            service.take(1)


class AwaySource(ListSource):
    """Answers when `answers` is set."""

    answers = False
    tries = 0

    def start(self, *arguments: Any) -> None:
        self.tries += 1
        if not self.answers:
            raise SourceAwayError("nobody answers")
        super().start(*arguments)


def test_a_live_stream_that_does_not_answer_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("stream_trainer.ingest.thread.FIRST_BACKOFF_S", 0.01)
    source = AwaySource(records_of([good(0)]), finite=False)
    with running(Service(source)) as service:
        wait_for(lambda: source.tries >= 3)
        assert service.ingest.away == "nobody answers"
        assert service.metric("source_reachable") == 0
        source.answers = True
        assert len(service.take(1)) == 1
        assert service.ingest.away == ""
    assert caplog.text.count("nobody answers") == 1


def test_a_finite_stream_that_does_not_answer_fails_at_once() -> None:
    with running(Service(AwaySource(records_of([good(0)])))) as service:
        with pytest.raises(SourceAwayError, match="nobody answers"):
            service.take(1)
        assert service.source.tries == 1


def test_a_stop_while_nobody_answers_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream_trainer.ingest.thread.MAX_BACKOFF_S", LONG_S)
    monkeypatch.setattr("stream_trainer.ingest.thread.FIRST_BACKOFF_S", LONG_S)
    source = AwaySource(records_of([good(0)]), finite=False)
    service = Service(source)
    service.ingest.start({}, {})
    wait_for(lambda: service.ingest.away != "")
    service.ingest.stop_reading()
    service.ingest.stop()
    wait_for(lambda: not service.ingest.alive)
    assert source.tries == 1


def test_another_trainer_that_takes_over_is_told_before_a_checkpoint_is_published() -> None:
    source = ListSource(records_of([good(0)]), finite=False)
    source.fences = True
    with running(Service(source)) as service:
        service.take(1)
        service.ingest.confirm(step=0)
        assert source.commits == [({LOG: 0}, 0)]  # of the checkpoint before: the next one is not durable yet
        service.ingest.request_commit({LOG: 1}, 1)
        wait_for(lambda: len(source.commits) == 2)
        service.ingest.confirm(step=1)
        assert source.commits[1:] == [({LOG: 1}, 1)] * 2
        source.fail_commits = FencedError("another trainer has taken over")
        with pytest.raises(FencedError):
            service.ingest.confirm(step=2)
        with pytest.raises(FencedError):
            service.take(1)
    assert len(source.commits) == 3


def test_a_commit_that_fails_holds_up_no_checkpoint() -> None:
    source = ListSource(records_of([good(0)]), finite=False)
    source.fences, source.fail_commits = True, RuntimeError("the brokers are away")
    with running(Service(source)) as service:
        service.take(1)
        service.ingest.confirm(step=1)
        assert service.metric("commit_failures_total") == 1


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


def test_since_when_the_stream_cannot_be_read_is_known_until_it_can() -> None:
    source = ListSource(records_of([good(0)]), finite=False)
    with running(Service(source)) as service:
        service.take(1)
        assert service.ingest.unreachable_since is None
        source.reachable = False
        wait_for(lambda: service.ingest.unreachable_since is not None)
        first = service.ingest.unreachable_since
        turn = service.ingest.last_turn
        wait_for(lambda: service.ingest.last_turn > turn + 0.2)
        assert service.ingest.unreachable_since == first
        source.reachable = True
        wait_for(lambda: service.ingest.unreachable_since is None)
