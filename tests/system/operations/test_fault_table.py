"""The table of faults: what it says comes of what was seen, its alerts are there, and the page has it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from tests.system.operations.fault_table import faults
from tests.system.operations.fault_table.faults import FAULTS
from tests.system.operations.fault_table.report import MOST_LINES, ROOT, as_markdown, short, what_is_wrong
from tests.system.operations.fault_table.stage import FACTOR, STALL_HERE_S, STALL_S, why_not, write_rules
from tests.system.operations.fault_table.watching import most_lines, unix_time

PAGE = ROOT / "docs" / "how-to" / "answer-an-alert.md"
GOOD: dict[str, Any] = {
    "title": "a step hangs",
    "health": ["healthy", "stuck", "healthy"],
    "health_s": 11.0,
    "alert": "StreamTrainerStalled",
    "condition_s": 10.5,
    "wait_s": 710.0,
    "fired_s": 12.8,
    "others": [],
    "lines_before": 3,
    "lines": 4,
    "recovered_s": 0.8,
}


def test_rules_wait_shorter_by_the_factor_and_say_the_same(tmp_path: Path) -> None:
    waits = write_rules(tmp_path)
    deployed, written = (
        {
            rule["alert"]: rule
            for group in yaml.safe_load(path.read_text())["groups"]
            for rule in group["rules"]
            if "alert" in rule
        }
        for path in (ROOT / "deploy" / "prometheus" / "alerts.yml", tmp_path / "alerts.yml")
    )
    assert waits.keys() == deployed.keys() == written.keys()
    assert waits["StreamTrainerSourceAway"] == 300
    assert written["StreamTrainerSourceAway"]["for"] == f"{300 / FACTOR:.0f}s"
    assert "for" not in written["StreamTrainerRolledBack"]
    assert waits["StreamTrainerStalled"] == 120 + STALL_S - STALL_HERE_S
    changed = {name for name in deployed if deployed[name]["expr"] != written[name]["expr"]}
    assert changed == {"StreamTrainerStalled"}


def test_every_fault_that_calls_somebody_has_an_alert_and_a_row_on_the_page(tmp_path: Path) -> None:
    waits, page = write_rules(tmp_path), PAGE.read_text()
    for fault in FAULTS:
        assert f"| {fault.title} |" in page
        assert fault.alert is None or fault.alert in waits
        assert fault.alert is None or f"[{short(fault.alert)}](" in page


def test_the_page_has_a_table_of_which_nothing_is_wrong() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if any(f"| {fault.title} |" in line for fault in FAULTS)]
    assert len(rows) == len(FAULTS)
    for row in rows:
        lines = int(row.split("|")[7].split("(")[0])
        assert lines <= MOST_LINES
        assert row.split("|")[8].strip().endswith(" s")


def test_a_row_links_the_section_that_helps() -> None:
    (row,) = as_markdown([GOOD]).splitlines()[2:]
    assert "healthy → stuck → healthy" in row
    assert "[Stalled](#no-step-is-made)" in row
    assert "| 4 (3) |" in row
    assert "when-steps-go-wrong.md#the-model-died" in as_markdown([GOOD | {"alert": "StreamTrainerRolledBack"}])


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, None),
        ({"fired_s": None}, "did not fire"),
        ({"health_s": None}, "says nothing"),
        ({"health": ["healthy", "stuck", "healthy", "stuck"]}, "flaps"),
        ({"lines": MOST_LINES + 1}, "lines in a minute"),
        ({"recovered_s": None}, "did not recover"),
        ({"alert": None, "health": ["healthy"]}, None),
        ({"alert": None, "health": ["healthy"], "others": ["StreamTrainerDown"]}, "nobody should be called"),
    ],
)
def test_what_is_not_as_it_should_be_is_said(changed: dict[str, Any], why: str | None) -> None:
    found = list(what_is_wrong(GOOD | changed))
    assert [why in line for line in found] == [True] if why else not found


def test_the_worst_minute_of_a_log_is_found(tmp_path: Path) -> None:
    log = tmp_path / "log"
    seconds = [0, 1, 50, 100, 110, 120, 150, 300]
    lines = [{"time": f"2026-01-01T00:{second // 60:02d}:{second % 60:02d}.000Z"} for second in seconds]
    log.write_text("not JSON\n" + "".join(json.dumps(line) + "\n" for line in lines))
    start = unix_time("2026-01-01T00:00:00.000000000Z")
    assert most_lines(log, start, start + 1000) == 4
    assert most_lines(log, start, start + 60) == 3
    assert most_lines(log, start + 400, start + 1000) == 0


def test_a_restart_that_takes_as_long_as_an_outage_is_no_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, slow = iter([0.0, 20.0, 100.0, 160.0]), SimpleNamespace(broker_process=Mock(), start_broker=Mock())
    monkeypatch.setattr(faults, "time", SimpleNamespace(monotonic=lambda: next(seconds), sleep=lambda _: None))
    (restart,) = [fault for fault in FAULTS if fault.name == "restart"]
    restart.do(slow)  # type: ignore[arg-type]
    with pytest.raises(faults.TooBusyError, match="took 60 s"):
        restart.do(slow)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_every_fault_is_seen_and_got_over(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.system.operations.fault_table", f"--json={tmp_path / 'faults.json'}"]
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    found = subprocess.run(command, cwd=ROOT, env=os.environ | paths, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
