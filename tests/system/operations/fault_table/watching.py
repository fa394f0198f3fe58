"""Looks at the trainer and at Prometheus several times a second, and keeps what it saw and when."""

import json
import threading
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from tests.system.operations.fault_table.stage import Stage

LOOK_S = 0.25
ANSWER_S = 2.0  # for a probe; Kubernetes grants one second unless told otherwise
UNANSWERED = "no answer"


@dataclass(frozen=True)
class Seen:
    """What `/healthz` says from `at` on (Unix time)."""

    at: float
    health: str
    detail: str


@dataclass
class Alert:
    """An alert of Prometheus: since when its condition holds, and when it was first seen firing, and gone."""

    active: float
    firing: float | None = None
    gone: float | None = None


@dataclass
class Watch:
    """Everything that was seen."""

    stage: Stage
    health: list[Seen] = field(default_factory=list)
    alerts: dict[str, Alert] = field(default_factory=dict)
    _ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Watch":
        self._threads = [threading.Thread(target=self._look, args=(look,)) for look in (self._probe, self._ask)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _look(self, look: object) -> None:
        assert callable(look)
        while not self._ended.wait(LOOK_S):
            look()

    def _probe(self) -> None:
        health, detail = probe(f"http://127.0.0.1:{self.stage.config['server']['port']}/healthz")
        before = self.health[-1] if self.health else None
        if before is None or (before.health, bool(before.detail)) != (health, bool(detail)):
            self.health.append(Seen(time.time(), health, detail))
        elif detail:
            self.health[-1] = Seen(before.at, health, detail)

    def _ask(self) -> None:
        with suppress(OSError), urllib.request.urlopen(f"{self.stage.prometheus}/api/v1/alerts", timeout=5) as answer:
            found = {alert["labels"]["alertname"]: alert for alert in json.load(answer)["data"]["alerts"]}
            for name, alert in found.items():
                if name not in self.alerts or self.alerts[name].gone is not None:
                    self.alerts[name] = Alert(unix_time(alert["activeAt"]))
                if alert["state"] == "firing" and self.alerts[name].firing is None:
                    self.alerts[name].firing = time.time()
            for name, known in self.alerts.items():
                if name not in found and known.gone is None:
                    known.gone = time.time()

    def active(self) -> list[str]:
        """Names of the alerts whose condition holds."""
        return [name for name, alert in self.alerts.copy().items() if alert.gone is None]

    def is_well(self) -> bool:
        return bool(self.health) and self.health[-1].health == "healthy" and not self.health[-1].detail


def probe(address: str) -> tuple[str, str]:
    """Health in one word, and its reason."""
    try:
        with urllib.request.urlopen(address, timeout=ANSWER_S) as answer:
            page = json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            page = json.load(error)
    except OSError:
        return UNANSWERED, ""
    return page["health"], page["detail"]


def unix_time(text: str) -> float:
    """Of a time as Prometheus writes it, with nanoseconds."""
    whole, _, rest = text.rstrip("Z").partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{rest or 0}")


def most_lines(log: Path, start: float, end: float, window_s: float = 60.0) -> int:
    """The most lines that a log in JSON has within a minute, of those between two times."""
    times = []
    for line in log.read_text(errors="replace").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            times.append(datetime.fromisoformat(json.loads(line)["time"].replace("Z", "+00:00")).timestamp())
    times = [at for at in times if start <= at <= end]
    return max((sum(at <= other < at + window_s for other in times) for at in times), default=0)
