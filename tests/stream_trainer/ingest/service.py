"""An ingest thread and everything around it, without a trainer."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stream_trainer.ingest.buffer import Buffer
from stream_trainer.ingest.cursor import Cursor
from stream_trainer.ingest.letter_file import FileDeadLetters
from stream_trainer.ingest.thread import Ingest
from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.records import Record, Sample
from stream_trainer.samples.byte_tokenizer import byte_tokenizer
from stream_trainer.samples.decoder import REASONS, Decoder
from stream_trainer.settings.schema import BufferSettings, DeadLetterSettings, SampleSettings
from stream_trainer.sources.base import Source
from tests.helpers.fakes import ListDeadLetters, ListSource
from tests.helpers.service import LONG_S

DECODER = Decoder(byte_tokenizer(), SampleSettings(max_tokens=64, max_bytes=5000))
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


def good(number: int) -> bytes:
    return json.dumps({"id": number, "text": f"sample {number}"}).encode()


class SlowSource(ListSource):
    """Lets other threads have their turn between two polls: one that never waits may be done before they look."""

    def poll(self, timeout_s: float) -> list[Record]:
        time.sleep(0.01)
        return super().poll(timeout_s)
