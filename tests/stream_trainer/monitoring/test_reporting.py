"""Where progress is shown, and how."""

import logging
import os
import pty
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

import pytest

from stream_trainer.monitoring.logs import configure_logging
from stream_trainer.monitoring.progress import Progress
from stream_trainer.monitoring.reporting import shown, way
from stream_trainer.settings.schema import LogSettings
from tests.helpers.service import LONG_S, wait_for
from tests.stream_trainer.monitoring.test_logs import _untouched_logging  # noqa: F401


@contextmanager
def terminal() -> Iterator[tuple[TextIO, list[bytes]]]:
    """A terminal to write to, and what came out at its other side."""
    outer, inner = pty.openpty()
    came: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # the other side was closed
            while part := os.read(outer, 4096):
                came.append(part)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with os.fdopen(inner, "w") as stream:
        yield stream, came
    reader.join(LONG_S)
    os.close(outer)


@pytest.mark.parametrize(
    ("settings", "term", "expected"),
    [
        ({}, "xterm-256color", "live"),
        ({}, "dumb", "plain"),
        ({}, "", "plain"),
        ({"format": "json"}, "xterm", "plain"),
        ({"progress": "off"}, "xterm", "off"),
        ({"progress": "plain"}, "xterm", "plain"),
    ],
)
def test_the_way_on_a_terminal(
    settings: dict[str, str], term: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    with terminal() as (stream, _):
        assert way(LogSettings(**settings), stream) == expected


def test_the_way_elsewhere(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with open(os.devnull, "w") as stream:
        assert way(LogSettings(), stream) == "plain"
        assert way(LogSettings(progress="live"), stream) == "live"


def test_a_panel_cannot_be_json() -> None:
    with pytest.raises(ValueError, match="progress=live does not go with format=json"):
        LogSettings(progress="live", format="json")


def test_a_plain_line_from_time_to_time(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with shown(Progress(), "title", LogSettings(progress="plain", every_s=0.01)):
        wait_for(lambda: caplog.messages.count("progress") >= 3)
    told = len(caplog.records)
    assert vars(caplog.records[0])["doing"] == "starting"
    assert len(caplog.records) == told  # and none after the end


def test_log_lines_go_above_the_panel_which_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    log = logging.getLogger("stream_trainer.x")
    with terminal() as (stream, came):
        monkeypatch.setattr(sys, "stderr", stream)
        configure_logging(LogSettings())
        with shown(Progress(), "a title", LogSettings()):
            log.info("in the midst [bold] of %s", "x" * 100)
            print("printed by somebody", file=sys.stderr)
        log.info("after")
        assert sys.stderr is stream
    text = b"".join(came).decode()
    assert "\x1b[?25l" in text  # the cursor is hidden ...
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # ... and shown again
    assert "a title" in text
    lines = [line.rpartition("\x1b[2K")[2] for line in text.splitlines()]
    assert any(line.endswith(f"in the midst [bold] of {'x' * 100}") for line in lines)
    assert any("printed by somebody" in line for line in lines)
    assert "a title" not in text[text.rindex("\x1b[2K") :]
    assert text.endswith("after\r\n")


def test_without_colours_where_none_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    with terminal() as (stream, came):
        monkeypatch.setattr(sys, "stderr", stream)
        with shown(Progress(), "a title", LogSettings()):
            pass
    text = b"".join(came).decode()
    assert "a title" in text
    assert "\x1b[3" not in text
