"""What becomes of records that are the same as earlier ones, and of what is noted of samples."""

import json
from typing import Any

from stream_trainer.ingest.cursor import Cursor
from stream_trainer.ingest.judge import Judge
from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.records import Outcome, Record, Sample
from stream_trainer.samples.byte_tokenizer import byte_tokenizer
from stream_trainer.samples.decoder import REASONS, Decoder
from stream_trainer.settings.schema import DeadLetterSettings, SampleSettings
from tests.helpers.fakes import LOG, ListDeadLetters


class Desk:
    """A judge, and the cursor and metrics that it tells."""

    def __init__(self, cursor: Cursor | None = None, **settings: Any) -> None:
        self.cursor, self.metrics = cursor or Cursor(), Metrics(REASONS)
        decoder = Decoder(byte_tokenizer(), SampleSettings(**settings))
        self.judge = Judge(decoder, ListDeadLetters(), self.cursor, self.metrics, DeadLetterSettings())

    def read(self, *fields: dict[str, Any], first: int = 0) -> list[Sample]:
        records = [Record(LOG, at, at + 1, json.dumps(one).encode()) for at, one in enumerate(fields, start=first)]
        return self.judge.judge(
            [(record, self.cursor.fetched(LOG, record.offset, record.next_offset)) for record in records]
        )

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"stream_trainer_{name}", labels)


def test_a_duplicate_is_decided_and_counted_and_does_not_become_a_sample() -> None:
    desk = Desk(duplicates="id")
    samples = desk.read({"id": 1, "text": "a"}, {"id": 1, "text": "a"}, {"id": 2, "text": "a"})
    assert [sample.offset for sample in samples] == [0, 2]
    assert desk.cursor.counts[Outcome.DUPLICATE] == 1
    assert desk.metric("unselected_total", why="duplicate") == 1


def test_without_the_setting_every_record_is_a_sample() -> None:
    assert len(Desk().read({"id": 1, "text": "a"}, {"id": 1, "text": "a"})) == 2


def test_a_restart_reads_an_undecided_record_as_itself_and_knows_its_duplicate() -> None:
    desk = Desk(duplicates="content")
    (sample,) = desk.read({"text": "a"}, {"text": "a"})
    snapshot = json.loads(json.dumps({"cursor": (kept := desk.judge.snapshot()).cursor, "parts": kept.parts}))
    again = Desk(Cursor.restore(snapshot["cursor"]), duplicates="content")
    again.judge.parts["duplicates"].load_state_dict(snapshot["parts"]["duplicates"])  # type: ignore[attr-defined]
    again.cursor.begin({LOG: 0})
    assert [found.offset for found in again.read({"text": "a"}, {"text": "a"}, {"text": "a"})] == [sample.offset]
    assert again.cursor.counts[Outcome.DUPLICATE] == 2, "one of them before the restart"


def test_what_is_noted_of_samples_is_counted() -> None:
    desk = Desk()
    text = "<|im_start|>user\nHi<|im_end|>\n"
    desk.read({"text": text}, {"text": text}, {"text": "a"})
    assert desk.metric("sample_notes_total", note="formatted_text") == 2
