"""The ingest benchmark in small: what it writes, what its records are, and its one-line errors."""

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.ingest import __main__ as ingest
from benchmarks.ingest.service import Moment, lag_growth
from benchmarks.ingest.stream import RECORD_BYTES, make_records
from stream_trainer.errors import SampleError
from stream_trainer.records import Partition, Record, Sample
from stream_trainer.samples.byte_tokenizer import byte_tokenizer
from stream_trainer.samples.decoder import Decoder
from stream_trainer.settings.schema import SampleSettings
from tests.helpers.brokers import needs_apache_kafka

PHASES = ["ingest by a decoder that has seen nothing", "poll", "poll, parse", "poll, parse, tokenise", "ingest"]
PHASES += ["the tokenizer's backend alone"]
LAG = ["lag growth at twice the trainer's rate", "most records in the buffer"]
LAG += ["share of the time that reading paused", "memory growth once the buffer was full"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "READINGS", 1)
    monkeypatch.setattr(ingest, "STEPS", 2)
    monkeypatch.setattr(ingest, "LAG_S", 1.0)
    monkeypatch.setattr(ingest, "FULL_AFTER_S", 0.0)


def measured(arguments: list[str], path: Path) -> dict[tuple[str, str], float]:
    assert ingest.main([*arguments, "--records=200", f"--json={path}"]) == 0
    result = json.loads(path.read_text())
    assert result["machine"]["cpu"]
    assert {"version", "date"} <= set(result)
    assert result["versions"]["tokenizers"]
    assert abs(result["record_bytes"] - RECORD_BYTES) < 30
    return {(line["figure"], line["unit"]): line["value"] for line in result["summary"]}


def test_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = measured(["--source=jsonl"], tmp_path / "result.json")
    assert {name for name, unit in figures if unit == "records/s"} == set(PHASES)
    assert {name for name, unit in figures if unit == "us/record"} == {f"{name}: CPU time" for name in PHASES}
    assert all(value > 0 for (_, unit), value in figures.items() if unit != "ratio")
    assert 0 <= figures["share of the step spent waiting for data", "ratio"] <= 1
    assert "share of the step spent waiting for data" in capsys.readouterr().out


@pytest.mark.slow
@needs_apache_kafka("the mock cluster holds too little")
def test_a_topic(tmp_path: Path) -> None:
    figures = measured([], tmp_path / "result.json")
    assert {name for name, _ in figures} >= {*PHASES, *LAG}


def test_records_are_of_one_size_and_one_in_a_hundred_is_malformed() -> None:
    values = list(make_records(800, seed=0))
    assert values == list(make_records(800, seed=0))
    assert values != list(make_records(800, seed=1))
    assert all(RECORD_BYTES - 60 < len(value) <= RECORD_BYTES for value in values)
    decoder = Decoder(byte_tokenizer(), SampleSettings())
    records = [Record(Partition("log", 0), number, number + 1, value) for number, value in enumerate(values)]
    found = decoder.decode_batch(records)
    reasons = Counter(result.reason for result in found if isinstance(result, SampleError))
    assert reasons == {"bad_json": 2, "bad_utf8": 2, "missing_fields": 2, "wrong_type": 2}
    assert sum(isinstance(result, Sample) for result in found) == 792


def test_the_growth_of_the_lag_is_a_slope() -> None:
    moments = [Moment(t, 7 + 200 * t, 0, 0, False, 0) for t in (0.0, 1.0, 3.0)]
    assert lag_growth(moments) == pytest.approx(200)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--records=1"], "error: --records 1 is too few; give 100 or more"),
        (["--cores=0"], "error: --cores 0 is too few; give 1 or more"),
        (["--max-tokens=1"], "error: --max-tokens 1 is too few; give 2 or more"),
        (["--tokenizer=nowhere/at/all"], "error: --tokenizer nowhere/at/all holds no tokenizer"),
        ([], "error: KAFKA_HOME is not set"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KAFKA_HOME", raising=False)
    assert ingest.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)
    assert ";" in line
