"""`stream-trainer ctl` against a real address: what it prints, and one line for whatever goes wrong."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from stream_trainer.cli import main
from stream_trainer.demo.broker import free_port
from stream_trainer.monitoring import control
from stream_trainer.monitoring.control import ControlServer
from stream_trainer.monitoring.orders import Orders, Outcome
from stream_trainer.settings.sections.control import ControlSettings
from tests.helpers.service import configuration, jsonl, obey

TOKEN = "a-token-that-nobody-guesses"


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> Iterator[Orders]:
    """Of a server whose port and token the environment names."""
    orders = Orders()
    server = ControlServer(ControlSettings(enabled=True, port=0, token=TOKEN), orders, lambda: {"state": "idle"})
    _, port = server.start()
    monkeypatch.setenv("STREAM_TRAINER_CONTROL__PORT", str(port))
    monkeypatch.setenv("STREAM_TRAINER_CONTROL__TOKEN", TOKEN)
    yield orders
    server.stop()


def test_what_came_of_an_order(orders: Orders, capsys: pytest.CaptureFixture[str]) -> None:
    thread = obey(orders, Outcome.DONE, "paused after step 7")
    assert main(["ctl", "pause"]) == 0
    thread.join()
    assert capsys.readouterr().out == "pause: paused after step 7\n"
    thread = obey(orders, Outcome.REFUSED, "target.path=x holds no samples")
    assert main(["ctl", "reload-target"]) == 1
    thread.join()
    assert capsys.readouterr().err == "error: reload-target is refused: target.path=x holds no samples\n"


def test_a_long_step_is_waited_for_but_not_for_ever(
    orders: Orders, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "WAIT_S", 0.01)
    assert main(["ctl", "checkpoint", "--wait=0"]) == 1
    assert capsys.readouterr().err == "error: checkpoint still waits for the end of the step; it will be obeyed then\n"
    thread = obey(orders, Outcome.DONE, "the first")
    thread.join()
    thread = threading.Timer(0.2, lambda: obey(orders, Outcome.DONE, "the second"))
    thread.start()
    assert main(["ctl", "checkpoint"]) == 0
    assert capsys.readouterr().out == "checkpoint: the second\n"


def test_the_status_is_shown(orders: Orders, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ctl", "status"]) == 0
    assert json.loads(capsys.readouterr().out) == {"state": "idle"}


def test_address_and_token_may_come_from_the_settings(
    orders: Orders, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(tmp_path, jsonl(tmp_path / "in.jsonl"), control={"enabled": True})
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(config))
    assert main(["ctl", "status", f"--config={tmp_path / 'settings.yaml'}"]) == 0
    monkeypatch.setenv("STREAM_TRAINER_CONTROL__TOKEN", "another-token-altogether")
    assert main(["ctl", "status"]) == 1
    assert capsys.readouterr().err == (
        "error: the token is not the trainer's; set STREAM_TRAINER_CONTROL__TOKEN to that\n"
    )


def test_what_is_wrong_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["ctl", "pause"]) == 2
    assert capsys.readouterr().err == (
        "error: control: enabled=true needs token or token_file; set STREAM_TRAINER_CONTROL__TOKEN\n"
    )
    monkeypatch.setenv("STREAM_TRAINER_CONTROL__TOKEN", TOKEN)
    url = f"http://127.0.0.1:{free_port()}"
    assert main(["ctl", "pause", f"--url={url}"]) == 1
    line = capsys.readouterr().err
    assert line.startswith(f"error: {url} does not answer (")
    assert len(line.splitlines()) == 1
    assert TOKEN not in line
    assert main(["ctl", "dance"]) == 2


def test_an_address_elsewhere_is_warned_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAM_TRAINER_CONTROL__TOKEN", TOKEN)
    assert main(["ctl", "pause", "--url=http://nowhere.invalid:9"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "warning: the token travels unencrypted to http://nowhere.invalid:9"
