"""What the ingest thread does with records that cannot be used: none vanishes, and too many end the run."""

from pathlib import Path

import pytest
from gradient_selectors.state import load_states

from stream_trainer.errors import PoisonError, SourceError
from stream_trainer.ingest.cursor import Cursor
from stream_trainer.ingest.letter import read_dead_letters
from stream_trainer.ingest.letter_file import FileDeadLetters
from stream_trainer.records import Outcome
from stream_trainer.samples.decoder import REASONS
from stream_trainer.settings.schema import DeadLetterSettings
from tests.helpers.fakes import LOG, ListDeadLetters, ListSource, records_of
from tests.helpers.malformed import malformed, malformed_values
from tests.helpers.service import wait_for
from tests.stream_trainer.ingest.service import UNLIMITED, Service, SlowSource, good, running


def test_a_stream_that_ends_without_one_sample_is_an_error() -> None:
    service = Service(ListSource(records_of([b"no", b"no"])), limits=DeadLetterSettings())
    with running(service), pytest.raises(PoisonError, match="all 2 last records of the stream cannot be used"):
        service.take_all()
    assert service.cursor.counts[Outcome.DEAD_LETTERED] == 2


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


def test_a_dead_letter_that_cannot_be_kept_fails_the_trainer_and_stays_undecided() -> None:
    letters = ListDeadLetters(fail_with=SourceError("disk full"))
    service = Service(ListSource(records_of([b"{"])), dead_letters=letters)
    with running(service), pytest.raises(SourceError, match="disk full"):
        service.take(1)
    assert service.cursor.positions() == {LOG: 0}
    assert service.cursor.counts[Outcome.DEAD_LETTERED] == 0


def test_the_generator_of_malformed_values_has_a_line_for_each() -> None:
    values = malformed_values(5000)
    assert len(dict(values)) == len(values)
    assert not any(b"\n" in value for _, value in values)


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
