"""What a run did lately, in bounded memory: rows over time, evaluations and events, for the page's charts.

One thread writes, others read. Old rows are thinned out rather than dropped, so that the whole run is always there:
the older, the coarser.
"""

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_ROWS = 1200
MAX_EVENTS = 200

Row = dict[str, Any]


@dataclass
class Series:
    """Rows in their order, each with a number that only grows. When it is full, its older half is halved."""

    limit: int = MAX_ROWS
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Append a row."""
        if len(self.rows) >= self.limit:
            half = len(self.rows) // 2
            self.rows = self.rows[:half:2] + self.rows[half:]
        self.rows.append(row)


class History:
    """Rows, evaluations and events of one run. JSON values only.

    Attributes:
        run: tells this run from the one before, whose numbers a client may still have.
    """

    def __init__(self) -> None:
        self.run = f"{time.time():.3f}"
        self._lock = threading.Lock()
        self._number = 0
        self._rows = Series()
        self._evaluations = Series()
        self._events: deque[Row] = deque(maxlen=MAX_EVENTS)
        self._start: dict[str, float] = {}

    def row(self, **values: Any) -> None:
        """Add a row to the charts."""
        with self._lock:
            self._rows.add(self._numbered(values))

    def evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        """Add losses by set (nats per token). Each set's first is its start."""
        with self._lock:
            for name, loss in losses.items():
                self._start.setdefault(name, loss)
            self._evaluations.add(self._numbered({"step": step, "losses": dict(losses)}))

    def event(self, step: int, kind: str, text: str) -> None:
        """Add something that is worth a mark."""
        with self._lock:
            self._events.append(self._numbered({"step": step, "kind": kind, "text": text}))

    def restart(self, name: str) -> None:
        """The set holds other samples from now on: its next loss is its start."""
        with self._lock:
            self._start.pop(name, None)

    def since(self, number: int) -> dict[str, Any]:
        """All that came after a number, which is that of the last answer; 0 for everything."""
        with self._lock:
            found = {"rows": self._rows.rows, "evaluations": self._evaluations.rows, "events": self._events}
            later = {name: [row for row in rows if row["number"] > number] for name, rows in found.items()}
            return {"run": self.run, "number": self._number, "start": dict(self._start), **later}

    def change(self, name: str, seconds: float) -> tuple[float, float] | None:
        """By how much a value of the rows has changed over about so many seconds, and over how many exactly."""
        with self._lock:
            rows = [row for row in self._rows.rows if row.get(name) is not None]
        late = [row for row in rows if row["time"] >= time.time() - seconds]
        if len(late) < 2 or late[-1]["time"] <= late[0]["time"]:
            return None
        return late[-1][name] - late[0][name], late[-1]["time"] - late[0]["time"]

    def _numbered(self, values: Row) -> Row:
        self._number += 1
        return {"number": self._number, "time": time.time(), **values}
