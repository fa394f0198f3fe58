"""The table of faults, for people, and what in it is not as it should be."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[4]
MOST_LINES = 20  # a minute
HEADER = (
    "fault",
    "`/healthz`",
    "said after",
    "alert",
    "its condition holds after",
    "it then waits",
    "log lines in the worst minute (before)",
    "well again after",
)


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table of Markdown."""
    lines = [HEADER, ["---"] * len(HEADER), *map(_cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: Mapping[str, Any]) -> list[str]:
    alert = "none, rightly" if row["alert"] is None else f"[{short(row['alert'])}]({section_of(row['alert'])})"
    return [
        row["title"],
        " → ".join(row["health"]),
        _seconds(row["health_s"]),
        alert,
        _seconds(row["condition_s"]),
        "–" if row["alert"] is None else _seconds(row["wait_s"]),
        f"{row['lines']} ({row['lines_before']})",
        "by a restart" if row["recovered_s"] is None else _seconds(row["recovered_s"]),
    ]


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f} s"


def short(alert: str) -> str:
    return alert.removeprefix("StreamTrainer")


def section_of(alert: str) -> str:
    """The link to its section of the runbook, from the page `answer-an-alert.md`."""
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())
    found = {rule.get("alert"): rule for group in rules["groups"] for rule in group["rules"]}
    page, _, section = found[alert]["annotations"]["runbook"].partition("#")
    name = Path(page).name
    return f"#{section}" if name == "answer-an-alert.md" else f"{name}#{section}"


def what_is_wrong(row: Mapping[str, Any]) -> Iterator[str]:
    """Why a row is not as it should be, a line each."""
    title = row["title"]
    if row["alert"] is not None and row["fired_s"] is None:
        yield f"{title}: {row['alert']} did not fire"
    if row["alert"] is None and (row["others"] or len(row["health"]) > 1):
        yield f"{title}: {row['health']} and {row['others']}, and nobody should be called"
    if row["alert"] is not None and row["health_s"] is None:
        yield f"{title}: /healthz says nothing"
    if len(row["health"]) > 3:
        yield f"{title}: health flaps: {row['health']}"
    if row["lines"] > MOST_LINES:
        yield f"{title}: {row['lines']} lines in a minute"
    if row["recovered_s"] is None:
        yield f"{title}: it did not recover"
