"""A target that a compacted topic holds: it takes over between steps, and a broken one is refused."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from stream_trainer.checkpoints.fingerprint import digest_of_file
from stream_trainer.errors import SettingsError
from stream_trainer.service import serve
from stream_trainer.settings.schema import Settings
from stream_trainer.sources.compacted import topic as module
from stream_trainer.training.watchers import Watcher
from tests.helpers.brokers import create_topic, publish
from tests.helpers.service import (
    LONG_S,
    configuration,
    get,
    good,
    goods,
    kafka,
    metrics,
    on_free_port,
    trainer_json,
    wait_for,
)


@pytest.fixture
def config(tmp_path: Path, broker: str, topic: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run that waits for more of its stream, and whose target lies in a topic."""
    monkeypatch.setattr(module, "LOOK_S", 0.2)
    for name, values in ((topic, goods(24)), (f"{topic}-goals", goods(4))):
        create_topic(broker, name)
        publish(broker, name, values)
    own = {"path": str(tmp_path / "kept.jsonl"), "topic": f"{topic}-goals"}
    source = kafka(broker, topic, stop_at_end=False)
    return on_free_port(configuration(tmp_path, source, target=own, buffer={"wait_s": 0.1}))


class Running:
    """The service in a thread, and what it said."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.events: list[str] = []
        self.stop = threading.Event()
        watcher = Watcher(on_event=lambda _step, kind, text: self.events.append(f"{kind}: {text}"))
        self.thread = threading.Thread(target=lambda: serve(Settings(**config), self.stop, watcher))

    def __enter__(self) -> "Running":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join(LONG_S)
        assert not self.thread.is_alive()


def is_idle(config: dict[str, Any]) -> bool:
    return '"state": "idle"' in get(config, "/status")[1]


def digest_saved(config: dict[str, Any]) -> object:
    return trainer_json(config)["fingerprint"]["target.path_contents"]


@pytest.mark.slow
def test_the_target_follows_its_topic(config: dict[str, Any], broker: str) -> None:
    goals, path = config["target"]["topic"], Path(config["target"]["path"])
    with Running(config) as run:
        wait_for(lambda: is_idle(config))
        first = digest_of_file(path)
        assert len(path.read_bytes().splitlines()) == 4
        publish(broker, goals, [None, good(41)])
        wait_for(lambda: len(run.events) == 1)
        wait_for(lambda: digest_saved(config) == digest_of_file(path) != first)
        assert run.events[0].startswith(f"target_replaced: 3 samples of target.topic={goals}, loss ")
        assert [json.loads(line)["id"] for line in path.read_bytes().splitlines()] == [41, 2, 3]
        assert metrics(config)["target_topic_reachable"] == 1
        in_use = digest_of_file(path)
        publish(broker, goals, [b"garbage"])
        wait_for(lambda: len(run.events) == 2)
        assert run.events[1].startswith(f"target_refused: target.topic={goals}, target.path=")
        assert "line 1 is not a sample" in run.events[1]
        wait_for(lambda: metrics(config)['orders_total{action="reload-target",result="refused"}'] == 1)
        assert digest_of_file(path) == in_use
    with Running(config) as again:
        wait_for(lambda: is_idle(config))
        wait_for(lambda: len(again.events) == 1)
        assert [event.partition(":")[0] for event in again.events] == ["target_refused"], "the checkpoint knows its own"
        publish(broker, goals, [good(50)])
        wait_for(lambda: len(again.events) == 2)
        assert again.events[1].startswith("target_replaced: 4 samples")


def test_a_run_goes_on_with_what_it_kept_while_the_topic_is_away(
    config: dict[str, Any], broker: str, topic: str
) -> None:
    with Running(config):
        wait_for(lambda: is_idle(config))
    gone = config | {"target": config["target"] | {"topic": f"{topic}-gone"}}
    with pytest.raises(SettingsError, match=r"target\.path=.*kept\.jsonl is not of target\.topic="):
        serve(Settings(**gone), threading.Event())
    (Path(config["target"]["path"]).parent / "kept.jsonl.topic").write_text(f"{topic}-gone")
    with Running(gone) as run:
        wait_for(lambda: is_idle(gone))
        assert metrics(gone)["target_topic_reachable"] == 0
        create_topic(broker, f"{topic}-gone")
        publish(broker, f"{topic}-gone", [good(60)])
        wait_for(lambda: run.events[-1].startswith("target_replaced: "))
        first, *empty, _ = (event.partition(":")[0] for event in run.events)
        assert first == "settings_changed"
        assert set(empty) <= {"target_refused"}  # it may be looked at before anything is in it
        assert metrics(gone)["target_topic_reachable"] == 1


def test_without_anything_kept_a_broken_first_set_ends_the_run_and_leaves_no_trace(
    config: dict[str, Any], broker: str
) -> None:
    publish(broker, config["target"]["topic"], [b"garbage"])
    with pytest.raises(SettingsError, match=r"target\.topic=.*line 1 is not a sample"):
        serve(Settings(**config), threading.Event())
    assert not Path(config["target"]["path"]).exists()


def test_a_topic_needs_brokers(tmp_path: Path) -> None:
    source = {"kind": "jsonl", "jsonl": {"path": "none.jsonl"}}
    with pytest.raises(ValueError, match=r"target\.topic=goals needs source\.kind=kafka"):
        Settings(**configuration(tmp_path, source, target={"topic": "goals"}))
