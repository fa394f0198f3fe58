"""Logging to standard error: text for people, or one JSON object a line for collectors. Times are UTC.

With `log.format=json` all that Python writes to standard error is such an object: warnings, what other packages print,
mistakes of the user, and what nobody caught. Only what compiled code writes past Python is not.
"""

import json
import logging
import math
import re
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from io import TextIOBase
from types import TracebackType
from typing import Any, TextIO

from stream_trainer.errors import StreamTrainerError
from stream_trainer.monitoring.hold_back import HoldBack, message_of
from stream_trainer.settings.schema import LogSettings, Settings

# Libraries that report on every request or reconnection. What matters of it, we log ourselves.
_NOISY = ("kafka", "transformers", "huggingface_hub", "httpx", "httpcore", "urllib3", "filelock")

MAX_LINE_CHARS = 8192  # of what is printed to standard error without a line break

# What the logging module itself puts on a record; everything beyond came in through `extra`.
_OWN = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime", "taskName"}


class Formatter(logging.Formatter):
    """One line per record, with the fields given as `extra`; only tracebacks in text format take more."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self.as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        extra = {name: value for name, value in vars(record).items() if name not in _OWN}
        message = message_of(record)
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self.as_json:
            fields = {"time": time, "level": record.levelname, "logger": record.name, "message": message}
            stack = {"stack": record.stack_info} if record.stack_info else {}
            return as_json({**fields, **extra, **fields, **stack, **({"exception": trace} if trace else {})})
        line = f"{time} {record.levelname} {record.name}: {message}"
        line += "".join(f" {name}={value}" for name, value in extra.items())
        return f"{line}\n{trace}" if trace else line


def as_json(fields: Mapping[str, Any]) -> str:
    """One line of JSON, whatever the values are: numbers that JSON does not have become null."""
    known = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in fields.items()}
    try:
        return json.dumps(known, default=str, allow_nan=False)
    except (TypeError, ValueError):  # keys that are no text, numbers within, or a value that holds itself
        return json.dumps({name: v if isinstance(v, str | int | None) else str(v) for name, v in known.items()})


class _Handler(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: a line that cannot be written cannot be told of on the same stream either."""


class Printed(TextIOBase):
    """In the place of `sys.stderr`: every line that is printed there becomes a record of the logger `stderr`."""

    def __init__(self, beneath: TextIO) -> None:
        self.beneath = beneath
        self._begun = ""

    def write(self, text: str) -> int:
        """Log the lines that are whole; progress bars end theirs with a carriage return."""
        *lines, self._begun = re.split(r"[\r\n]", self._begun + text)
        if len(self._begun) > MAX_LINE_CHARS:
            lines, self._begun = [*lines, self._begun], ""
        for line in filter(str.strip, lines):
            logging.getLogger("stderr").warning("%s", line)
        return len(text)

    def fileno(self) -> int:
        return self.beneath.fileno()


def configure_logging(settings: LogSettings, stream: TextIO | None = None) -> None:
    """Send every record, and Python's warnings, to `stream`, standard error unless given. May be called again."""
    handler = _Handler(stream or getattr(sys.stderr, "beneath", sys.stderr))
    handler.setFormatter(Formatter(settings.format == "json"))
    handler.addFilter(HoldBack())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.level)
    if "transformers" in sys.modules:
        adopt_transformers()
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    logging.captureWarnings(True)


def adopt_transformers() -> None:
    """Let transformers log through us: it brings a handler of its own, in its own format, and progress bars."""
    from transformers.utils import logging as transformers_logging  # it takes a moment, which help need not wait for

    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    transformers_logging.disable_progress_bar()


def take_over_stderr() -> None:
    """From here on until the process ends, all that Python writes to standard error is one JSON object a line."""
    if isinstance(sys.stderr, Printed):
        return
    configure_logging(LogSettings(format="json"))
    sys.stderr = Printed(sys.stderr)
    sys.excepthook = _uncaught
    threading.excepthook = lambda args: _log_fatal(
        f"uncaught in thread {args.thread.name if args.thread else '?'}",
        args.exc_type,
        args.exc_value,
        args.exc_traceback,
    )
    sys.unraisablehook = lambda args: _log_fatal(
        args.err_msg or "ignored", args.exc_type, args.exc_value, args.exc_traceback
    )


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        _log_fatal("uncaught: the process ends", kind, error, trace)


def _log_fatal(what: str, kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if error is not None:
        logging.getLogger("stream_trainer").critical(
            "%s (%s: %s)", what, kind.__name__, error, exc_info=(kind, error, trace)
        )


def report_mistake(error: StreamTrainerError) -> None:
    """Log what the user can mend, with the exit code and the setting that a line names."""
    for line in str(error).splitlines():
        named: dict[str, Any] = {"setting": name} if (name := _setting_in(line)) else {}
        logging.getLogger("stream_trainer").error("%s", line, extra=named | {"exit_code": error.exit_code})


def _setting_in(line: str) -> str | None:
    """The first name of a setting in a line."""
    names = re.findall(r"\b[a-z_]+(?:\.[a-z0-9_]+)+", line)
    return next((name for name in names if name.partition(".")[0] in Settings.model_fields), None)
