"""Dead letters when things go wrong: a kill, a topic that takes none, a stream of nothing else."""

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from stream_trainer.errors import PoisonError
from stream_trainer.ingest.letter import read_dead_letters
from stream_trainer.service import serve
from stream_trainer.settings.schema import Settings
from stream_trainer.training.watchers import Watcher
from tests.helpers.brokers import ApacheKafka, create_topic, delete_topic, publish
from tests.helpers.service import (
    configuration,
    counts,
    decided,
    goods,
    interrupt_command,
    jsonl,
    kafka,
    metrics,
    on_free_port,
    run_and_terminate,
    run_command,
    run_main,
    serve_until,
    trainer_json,
    write_lines,
)
from tests.system.faults.ends import letters_in

pytestmark = pytest.mark.slow

GOOD, BAD = 400, 200


def offsets_of(path: Path) -> list[int]:
    return [letter.record.offset for letter in read_dead_letters(path)]


def mixed(path: Path) -> None:
    """After every two good samples one that cannot be used."""
    good = goods(GOOD)
    write_lines(path, [line for pair in range(0, GOOD, 2) for line in (*good[pair : pair + 2], b"not JSON")])


class CrashError(BaseException):
    """Ends a run as a kill does: without a last checkpoint."""


def crash(config: dict[str, Any], step: int) -> None:
    def on_step(number: int, *_: object) -> None:
        if number == step:
            raise CrashError

    with pytest.raises(CrashError):
        serve(Settings(**config), threading.Event(), Watcher(on_step))


def config_of(folder: Path, max_bytes: int | None) -> dict[str, Any]:
    mixed(folder / "samples.jsonl")
    return configuration(
        folder,
        jsonl(folder / "samples.jsonl"),
        buffer={"max_records": 16, "wait_s": 60.0},
        checkpoint={"dir": str(folder / "checkpoints"), "every_steps": 10},
        dead_letters={"path": str(folder / "dead.jsonl"), "max_bytes": max_bytes, "keep": 1000},
    )


def all_offsets(folder: Path) -> list[int]:
    return [offset for path in folder.glob("dead.jsonl*") for offset in offsets_of(path)]


@pytest.mark.parametrize("max_bytes", [None, 3000], ids=["one file", "put aside"])
def test_letters_are_in_the_file_once_after_crashes(max_bytes: int | None, tmp_path: Path) -> None:
    for name in ("whole", "crash"):  # of one length, for the letters hold the path
        (tmp_path / name).mkdir()
    config, whole = (config_of(tmp_path / name, max_bytes) for name in ("crash", "whole"))
    for step in (18, 19, 39):  # as much was read since a checkpoint that letters came after it, however far ahead
        crash(config, step)
        assert len(all_offsets(tmp_path / "crash")) > counts(config)["dead_lettered"]  # else nothing is to be cut
    serve_until(config)
    found = all_offsets(tmp_path / "crash")
    assert len(found) == len(set(found)) == counts(config)["dead_lettered"] == BAD
    assert sum(counts(config).values()) == GOOD + BAD
    serve_until(whole)
    parts, expected = trainer_json(config)["parts"], trainer_json(whole)["parts"]
    assert parts["dead_letters"] | {"last": None} == expected["dead_letters"] | {"last": None}
    assert list(parts["poison"].values()) == list(expected["poison"].values())


def test_letters_are_in_the_file_once_after_a_kill(tmp_path: Path) -> None:
    config = config_of(tmp_path, 3000)
    assert interrupt_command(tmp_path, config, signal.SIGKILL, step=17) == -signal.SIGKILL
    assert run_command(tmp_path, config) == 0
    found = all_offsets(tmp_path)
    assert len(found) == len(set(found)) == counts(config)["dead_lettered"] == BAD
    assert sum(counts(config).values()) == GOOD + BAD


def test_a_stream_of_poison_ends_the_run_and_can_be_read_past(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "samples.jsonl", [*goods(8), *[b"not JSON"] * 3000])
    config = configuration(tmp_path, jsonl(tmp_path / "samples.jsonl"))
    for _ in range(2):  # a restart stops again, at the next bad record
        assert run_main(tmp_path, config) == 8
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: dead_letters.max_")
        assert "of them for bad_json (write one JSON object a record)" in error
    stopped = counts(config)["dead_lettered"]
    assert 900 < stopped < 1200
    assert offsets_of(tmp_path / "dead-letters.jsonl") == sorted(set(offsets_of(tmp_path / "dead-letters.jsonl")))
    assert len(offsets_of(tmp_path / "dead-letters.jsonl")) == stopped
    config["dead_letters"] |= {"max_ratio": None, "max_in_a_row": None}
    serve_until(config)
    assert counts(config)["dead_lettered"] == len(offsets_of(tmp_path / "dead-letters.jsonl")) == 3000
    config["dead_letters"] |= {"max_ratio": 0.9}
    write_lines(tmp_path / "samples.jsonl", [*goods(8), *[b"not JSON"] * 3001])
    with pytest.raises(PoisonError):  # what was read past is remembered
        serve_until(config)


def test_sigterm_while_the_topic_takes_no_letters(apache_kafka: ApacheKafka, topic: str, tmp_path: Path) -> None:
    """Their records stay undecided, and are sent when the topic takes them: the run ends at once, and whole."""
    servers, dead = apache_kafka.bootstrap_servers, f"{topic}.dead-letters"
    for name in (topic, dead):
        create_topic(servers, name)
    publish(servers, topic, goods(40))
    source = kafka(servers, topic, stop_at_end=False)
    letters = {"kind": "topic"}
    config = on_free_port(configuration(tmp_path, source, dead_letters=letters, buffer={"wait_s": 1.0}))
    told: list[float] = []

    def ready() -> bool:
        if decided(config) == 40 and not told:
            delete_topic(servers, dead)
            publish(servers, topic, [b"not JSON"] * 5)
            told.append(0.0)
        if told and metrics(config).get("dead_letters_held") == 5:
            told.append(time.monotonic())
        return len(told) == 2

    assert run_and_terminate(config, ready) == 0
    assert time.monotonic() - told[1] < 60  # it was over 100
    assert counts(config)["dead_lettered"] == 0
    assert sum(counts(config).values()) == 40
    assert trainer_json(config)["cursor"]["partitions"][f"{topic}:0"] == {"next": 40, "decided": []}
    create_topic(servers, dead)
    config["source"]["kafka"]["stop_at_end"] = True
    serve_until(config)
    assert counts(config)["dead_lettered"] == 5
    assert sum(counts(config).values()) == 45
    assert trainer_json(config)["cursor"]["partitions"][f"{topic}:0"] == {"next": 45, "decided": []}
    assert sorted(letter.record.offset for letter in letters_in(servers, dead)) == [*range(40, 45)]
