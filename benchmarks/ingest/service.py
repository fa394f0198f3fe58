"""Ingest beside a trainer: how far it falls behind one that is too slow, and whether it keeps a real one waiting."""

import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

from benchmarks.ingest.stream import MALFORMED_EVERY, open_stream, write_records
from stream_trainer.demo.broker import HOST, free_port
from stream_trainer.errors import StreamTrainerError
from stream_trainer.ingest.buffer import Buffer
from stream_trainer.ingest.cursor import Cursor
from stream_trainer.ingest.letter_file import FileDeadLetters
from stream_trainer.ingest.thread import Ingest
from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.records import Outcome, Sample
from stream_trainer.samples.decoder import REASONS, Decoder
from stream_trainer.service import serve
from stream_trainer.settings.schema import BufferSettings, Settings
from stream_trainer.settings.sections.source import SourceSettings
from stream_trainer.sources import open_source
from stream_trainer.training.watchers import Watcher

POOL = 16
TAKEN_PER_S, PUBLISHED_PER_S = 200, 400  # records
FULL_AFTER_S = 4.0  # the buffer's 512 records fill at the difference of both rates, so reading pauses by then
TRAIN_POOL, TRAIN_TOKENS = 8, 192
MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": TRAIN_TOKENS,
}
CLI = "import sys; from stream_trainer.cli import main; sys.exit(main())"


@dataclass(frozen=True)
class Parts:
    """An ingest thread that runs, and what it fills."""

    ingest: Ingest
    buffer: Buffer
    cursor: Cursor
    metrics: Metrics

    def take(self) -> list[Sample]:
        """A pool, resolved as a trainer does; empty at the end of the stream."""
        pool = self.buffer.take(POOL, 10.0, lambda: False)
        for sample in pool:
            self.cursor.resolve(sample.partition, sample.offset, Outcome.TRAINED)
        return pool


@contextmanager
def ingesting(source: SourceSettings, decoder: Decoder, folder: Path) -> Iterator[Parts]:
    """The service's ingest thread on `source` with the default buffer, without a trainer."""
    metrics, cursor, buffer = Metrics(REASONS), Cursor(), Buffer(BufferSettings())
    letters = FileDeadLetters(folder / "dead-letters.jsonl")
    ingest = Ingest(open_source(source), decoder, letters, cursor, buffer, metrics)
    ingest.start({}, {})
    try:
        yield Parts(ingest, buffer, cursor, metrics)
    finally:
        ingest.stop()
        letters.close()


@dataclass(frozen=True)
class Moment:
    """What was seen at a time (seconds): records behind, records and bytes in the buffer, bytes of memory."""

    time: float
    lag: float
    records: int
    bytes: int
    paused: bool
    memory: int


def fall_behind(servers: str, decoder: Decoder, folder: Path, seconds: float) -> list[Moment]:
    """Take pools at a fixed rate for `seconds` while a producer of its own process publishes at twice that rate."""
    topic, lines, begin = "lag", folder / "lag.jsonl", folder / "lag-begin.jsonl"
    write_records(lines, int(PUBLISHED_PER_S * (seconds + 60)), seed=1)  # more than will be published
    write_records(begin, 1, seed=2)
    filled = open_stream(begin, servers, topic)  # makes the topic
    endless = filled.model_copy(update={"kafka": filled.kafka.model_copy(update={"stop_at_end": False})})
    publish = [sys.executable, "-c", CLI, "produce", str(lines), f"--topic={topic}", f"--rate={PUBLISHED_PER_S}"]
    publish.append(f"--bootstrap-servers={servers}")
    with (
        patch("stream_trainer.ingest.thread.LAG_INTERVAL_S", 0.2),
        ingesting(endless, decoder, folder) as parts,
        subprocess.Popen(publish, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as producer,
    ):
        try:
            parts.take()
            moments = list(_take_at_rate(parts, topic, seconds))
            if producer.poll() is not None:
                raise StreamTrainerError(
                    f"the producer ended before {seconds:g} s had passed; no figure of this run counts"
                )
            return moments
        finally:
            producer.kill()


def _take_at_rate(parts: Parts, topic: str, seconds: float) -> Iterator[Moment]:
    process, begun = psutil.Process(), time.monotonic()
    labels = {"topic": topic, "partition": "0"}
    for number in range(int(seconds * TAKEN_PER_S / POOL)):
        time.sleep(max(0.0, begun + number * POOL / TAKEN_PER_S - time.monotonic()))
        parts.take()
        lag = parts.metrics.registry.get_sample_value("stream_trainer_lag_records", labels) or 0.0
        buffer = parts.buffer
        yield Moment(
            time.monotonic() - begun, lag, buffer.records, buffer.bytes, parts.ingest.paused, process.memory_info().rss
        )


def lag_growth(moments: Sequence[Moment]) -> float:
    """Records a second by which the lag grows: the slope of a straight line through all moments."""
    mean_time = sum(m.time for m in moments) / len(moments)
    mean_lag = sum(m.lag for m in moments) / len(moments)
    spread = sum((m.time - mean_time) ** 2 for m in moments)
    return sum((m.time - mean_time) * (m.lag - mean_lag) for m in moments) / spread


def train(source: SourceSettings, tokenizer: Any, folder: Path, steps: int) -> dict[str, float]:
    """Seconds of each phase of `steps` steps of the service on a small model, as its own metrics have them.

    The step before them, which waits for the first records, does not count.
    """
    port, seen = free_port(), dict[int, dict[str, float]]()
    write_records(folder / "target.jsonl", MALFORMED_EVERY - 1, seed=3)

    def on_step(number: int, *_: object) -> None:
        if number in (1, steps + 1):
            seen[number] = _phase_seconds(port)

    serve(_training_settings(source, tokenizer, folder, steps + 1, port), threading.Event(), Watcher(on_step))
    return {phase: seconds - seen[1][phase] for phase, seconds in seen[steps + 1].items()}


def _training_settings(source: SourceSettings, tokenizer: Any, folder: Path, steps: int, port: int) -> Settings:
    saved = folder / "tokenizer"
    tokenizer.save_pretrained(saved)
    return Settings.model_validate(
        {
            "source": source,
            "model": {"config": MODEL | {"vocab_size": len(tokenizer)}, "tokenizer": str(saved)},
            "samples": {"max_tokens": TRAIN_TOKENS},
            "target": {"path": folder / "target.jsonl", "max_samples": TRAIN_POOL},
            "selection": {
                "profile": "thorough",
                "pool_size": TRAIN_POOL,
                "batch_size": 2,
                "preconditioner_warmup_steps": 2,
            },
            "training": {"max_steps": steps, "threads": 1},
            "checkpoint": {"dir": folder / "checkpoints"},
            "dead_letters": {"path": folder / "dead-letters.jsonl"},
            "server": {"host": HOST, "port": port},
        }
    )


def _phase_seconds(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{HOST}:{port}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    name = "stream_trainer_phase_seconds_total{phase="
    return {
        json.loads(line.removeprefix(name).partition("}")[0]): float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith(name)
    }
