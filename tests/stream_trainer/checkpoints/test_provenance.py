"""What a checkpoint says of who made it, and what a resume says of settings that are other now."""

import json
import logging
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from stream_trainer.checkpoints.provenance import commit_of, provenance_of, read_provenance, report_changes
from stream_trainer.service import serve
from stream_trainer.settings.schema import Settings
from stream_trainer.training.watchers import Watcher
from tests.helpers.service import MODEL, checkpoints, configuration, goods, jsonl, metrics, on_free_port, write_lines

SECRET = "hush-hush"


def config_of(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    write_lines(folder / "in.jsonl", goods(400))
    return configuration(folder, jsonl(folder / "in.jsonl"), **sections)


def test_all_settings_are_there_and_no_secret_is(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    sasl = {"sasl_mechanism": "PLAIN", "sasl_username": SECRET, "sasl_password": SECRET, "ssl_password": SECRET}
    config["source"] = {"kind": "kafka", "kafka": {"topic": "samples", "security_protocol": "SASL_SSL", **sasl}}
    config["model"]["config"] = MODEL | {"note": SECRET}
    found = provenance_of(Settings(**config), "1.2.3", {})
    assert found == json.loads(json.dumps(found))
    assert SECRET not in json.dumps(found)
    assert found["settings"]["source"]["kafka"]["topic"] == "samples"
    assert found["settings"]["optimizer"]["learning_rate"] == 1e-3
    assert found["settings"].keys() == Settings.model_fields.keys()
    assert found["code"]["version"] == "1.2.3"


def test_the_hash_tells_settings_apart_and_the_time_stays_with_it(tmp_path: Path) -> None:
    first = provenance_of(Settings(**config_of(tmp_path)), "1", {}) | {"settings_since": 7.0}
    again = provenance_of(Settings(**config_of(tmp_path)), "2", first)
    other = provenance_of(Settings(**config_of(tmp_path, checkpoint={"keep": 9})), "2", first)
    assert (again["settings_hash"], again["settings_since"]) == (first["settings_hash"], 7.0)
    assert other["settings_hash"] != first["settings_hash"]
    assert other["settings_since"] > 7.0


def test_changes_are_told_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    before = provenance_of(Settings(**config_of(tmp_path)), "1", {})
    now = provenance_of(
        Settings(**config_of(tmp_path, checkpoint={"keep": 9}, training={"max_steps": 3}, optimizer={"eps": 0.1})),
        "1",
        {},
    )
    told = report_changes(before, now, but=["optimizer.eps"])
    assert told == ["checkpoint.keep: 3, now 9", "training.max_steps: unset, now 3"]
    assert caplog.messages == [f"settings that are other than the checkpoint's: {'; '.join(told)}"]
    assert report_changes({}, now) == []  # from before it was kept
    assert report_changes(now, now) == []


def test_a_commit_is_that_of_the_checkout_itself(tmp_path: Path) -> None:
    assert commit_of(tmp_path) is None
    if shutil.which("git") is None:
        pytest.skip("git is not there")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    (tmp_path / "file").write_text("one")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message=one"], check=True)
    found = commit_of(tmp_path)
    assert found is not None
    assert len(found) == 40
    (tmp_path / "file").write_text("two")
    assert commit_of(tmp_path) == f"{found}-dirty"
    (tmp_path / "within").mkdir()
    assert commit_of(tmp_path / "within") is None


def test_a_resume_with_other_settings_is_marked(tmp_path: Path) -> None:
    config = config_of(tmp_path, training={"max_steps": 1})
    serve(Settings(**config), threading.Event())
    made = read_provenance(checkpoints(config)[-1])
    assert made["settings"]["training"]["max_steps"] == 1
    again = on_free_port(config) | {"training": config["training"] | {"max_steps": 2}, "log": {"every_s": 9}}
    again["optimizer"] = {"learning_rate": 1e-2}
    events: list[tuple[int, str, str]] = []
    seen: dict[str, float] = {}
    watcher = Watcher(
        on_step=lambda *_: seen.update(metrics(again)),
        on_event=lambda step, kind, text: events.append((step, kind, text)),
    )
    serve(Settings(**again), threading.Event(), watcher)
    ((step, kind, text),) = events
    assert (step, kind) == (1, "settings_changed")
    for part in (
        "optimizer.learning_rate: 0.001, now 0.01",
        "training.max_steps: 1, now 2",
        "log.every_s: 15.0, now 9.0",
    ):
        assert part in text
    later = read_provenance(checkpoints(config)[-1])
    assert later["settings_hash"] != made["settings_hash"]
    assert seen[f'settings_info{{hash="{later["settings_hash"]}"}}'] == 1
    assert seen["settings_changed_timestamp_seconds"] == later["settings_since"] > made["settings_since"]
