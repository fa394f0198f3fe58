"""Logging to standard error: text for people, or one JSON object a line for collectors. Times are UTC."""

import json
import logging
import math
import re
import sys
from datetime import UTC, datetime
from typing import TextIO

from stream_trainer.settings.schema import LogSettings

# Libraries that report on every request or reconnection. What matters of it, we log ourselves.
_NOISY = ("kafka", "transformers", "huggingface_hub", "httpx", "httpcore", "urllib3", "filelock")

HOLD_BACK_S = 300.0
MAX_KINDS = 1000

# What the logging module itself puts on a record; everything beyond came in through `extra`.
_OWN = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime", "taskName"}


class HoldBack(logging.Filter):
    """Lets one line of each kind that the Kafka client logs pass in `HOLD_BACK_S`; the next says how many were held.

    In an outage the client logs several lines a second. That there is one, and when it ends, we log ourselves.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kinds: dict[tuple[str, str], tuple[float, int]] = {}  # when a line passed last, and held back since

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.partition(".")[0] != "kafka":
            return True
        # Some messages are finished texts, with numbers and addresses in them.
        kind = (record.name, re.sub(r"\d+|<.*>", "", str(record.msg)))
        passed, held = self._kinds.get(kind, (-math.inf, 0))
        if record.created - passed < HOLD_BACK_S:
            self._kinds[kind] = (passed, held + 1)
            return False
        if len(self._kinds) >= MAX_KINDS:
            self._kinds.clear()
        self._kinds[kind] = (record.created, 0)
        if held:
            record.held_back = held
        return True


class Formatter(logging.Formatter):
    """One line per record, with the fields given as `extra`; only tracebacks in text format take more."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        extra = {name: value for name, value in vars(record).items() if name not in _OWN}
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self._as_json:
            fields = {"time": time, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
            return json.dumps(extra | fields | ({"exception": trace} if trace else {}), default=str)
        line = f"{time} {record.levelname} {record.name}: {record.getMessage()}"
        line += "".join(f" {name}={value}" for name, value in extra.items())
        return f"{line}\n{trace}" if trace else line


def configure_logging(settings: LogSettings, stream: TextIO | None = None) -> None:
    """Send every record, and Python's warnings, to `stream`, standard error unless given. May be called again."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(Formatter(settings.format == "json"))
    handler.addFilter(HoldBack())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.level)
    _adopt_transformers()
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    logging.captureWarnings(True)


def _adopt_transformers() -> None:
    """Let transformers log through us: it brings a handler of its own, in its own format, and progress bars."""
    from transformers.utils import logging as transformers_logging  # it takes a moment, which help need not wait for

    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    transformers_logging.disable_progress_bar()
