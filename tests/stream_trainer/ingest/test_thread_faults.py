"""The ingest thread where its source fails, does not answer, loses records, or belongs to another trainer."""

from typing import Any

import pytest

from stream_trainer.errors import FencedError, SourceAwayError, SourceError
from stream_trainer.records import Record
from tests.helpers.fakes import LOG, ListSource, records_of
from tests.helpers.service import LONG_S, wait_for
from tests.stream_trainer.ingest.service import Service, good, running


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
