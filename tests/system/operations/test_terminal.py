"""`stream-trainer run` as a process: on a terminal, in a file of plain lines, and in JSON whatever goes wrong."""

import json
import os
import pty
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.service import LONG_S, MAIN, configuration, goods, jsonl, start_command, write_lines

# What other packages do: warn, print, log badly, fail in a thread of their own, and fail the run.
NOISE = """
import logging, sys, threading, warnings
from stream_trainer import service
from stream_trainer.cli import main

def noisy(settings, stop, **others):
    for number in range(200):
        warnings.warn(f"option {number} is old", UserWarning)
        logging.getLogger("kafka.net").error("Connection %d failed: %s", number, "ECONNREFUSED")
        print(f"50%\\r100% of {number}", file=sys.stderr)
    logging.getLogger("x").warning("%d", "no number", extra={"loss": float("nan")})
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    return serve(settings, stop, **others)

serve, service.serve = service.serve, noisy
FAILURE
sys.exit(main())
"""
FAILURE = """
from stream_trainer.training.trainer import Trainer
def fail(self): raise RuntimeError("a fault\\nof ours")
Trainer.run = fail
"""


def settings_in(folder: Path, **sections: Any) -> Path:
    write_lines(folder / "in.jsonl", goods(4000))
    steps = {"max_steps": 30, **sections.pop("training", {})}
    config = configuration(folder, jsonl(folder / "in.jsonl"), training=steps, **sections)
    (folder / "settings.yaml").write_text(yaml.safe_dump(config))
    return folder / "settings.yaml"


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Every line, each of which is an object of JSON."""
    lines = path.read_text().splitlines()
    found = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert all({"time", "level", "logger", "message"} <= fields.keys() for fields in found)
    return found


def run_to_end(settings: Path, code: str = MAIN) -> int:
    with (settings.parent / "log").open("wb") as log, start_command(settings, log, code) as process:
        return process.wait(LONG_S)


def test_on_a_terminal_progress_is_seen_and_nothing_stays(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    outer, inner = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    arguments = [sys.executable, "-c", MAIN, "run", f"--config={settings}"]
    process = subprocess.Popen(arguments, env=environment, stdin=subprocess.DEVNULL, stderr=inner)
    os.close(inner)
    seen = bytearray()
    with suppress(OSError):  # the end of a terminal
        while part := os.read(outer, 4096):
            seen += part
    os.close(outer)
    assert process.wait(LONG_S) == 0
    text = seen.decode()
    expected = ("loading model and tokenizer", "stream-trainer · ", "training", "target loss", "lag", "steps/s")
    assert [part for part in expected if part not in text] == []
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is shown again"
    assert "╭" not in text[text.rindex("\x1b[2K") :]
    assert "stopped; records" in text


def test_every_line_of_a_failing_run_is_json(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, log={"format": "json", "every_s": 0.05})
    assert run_to_end(settings, NOISE.replace("FAILURE", FAILURE)) == 1
    found = lines_of(tmp_path / "log")
    said = [fields["message"] for fields in found]
    for part, times in (("is old", 1), ("ECONNREFUSED", 1), ("50%", 1), ("100% of", 1), ("('no number',)", 1)):
        assert sum(part in message for message in said) == times, part
    assert "ZeroDivisionError" in next(
        fields["exception"] for fields in found if "uncaught in thread" in fields["message"]
    )
    assert found[-1]["level"] == "CRITICAL"
    assert "RuntimeError: a fault\nof ours" in found[-1]["exception"]
    assert "progress" in said
    assert said.index("loading model and tokenizer") < said.index("reading the target and the evaluation sets")


@pytest.mark.slow
def test_progress_in_plain_lines(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, log={"format": "json", "every_s": 0.05}, training={"max_steps": 150})
    assert run_to_end(settings) == 0
    told = [fields for fields in lines_of(tmp_path / "log") if fields["message"] == "progress"]
    last = [fields for fields in told if "pool_loss" in fields][-1]
    assert {
        "state",
        "step",
        "steps_per_s",
        "tokens_per_s",
        "lag",
        "target_loss_at_start",
        "chosen",
        "doing",
    } <= last.keys()


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        (["--log.format=json", "--selection.pool=8"], "selection.pool"),
        (["--log.format", "json", "--config=nowhere.yaml"], None),
        (["--config=json.yaml", "--server.port=-1"], "server.port"),
        (["--config=json.yaml"], "target.path"),
    ],
)
def test_a_mistake_of_the_user_is_one_json_line(options: list[str], setting: str | None, tmp_path: Path) -> None:
    (tmp_path / "json.yaml").write_text("log: {format: json}")
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    arguments = [sys.executable, "-c", MAIN, "run", *options]
    done = subprocess.run(arguments, cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    found = [json.loads(line) for line in done.stderr.splitlines()]
    assert found
    assert {(fields["level"], fields["exit_code"]) for fields in found} == {("ERROR", 2)}
    if setting is not None:
        assert setting in {fields.get("setting") for fields in found}
