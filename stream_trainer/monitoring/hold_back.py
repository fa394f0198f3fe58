"""Keeps a flood of like lines out of the log: the first passes, the rest are counted, and the next says how many."""

import logging
import math
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass, field

HOLD_BACK_S = 300.0  # one line of a kind of other packages in this time
OWN_LINES, OWN_S = 2, 60.0  # warnings of a kind of our own in this time
MAX_KINDS = 1000  # that are remembered, those seen last
MAX_ERRORS = 5  # of other packages under one template, which pass in `HOLD_BACK_S` if each says something new
KIND_CHARS = 300
# Lines of all kinds together, in `OWN_S`: its client tells of an outage in a dozen ways, and we tell of it ourselves.
PACKAGE_LINES = {"kafka": 3}

_OURS = frozenset({"stream_trainer", "gradient_selectors"})
_PLACEHOLDER = re.compile(r"%[-+ #0-9.*]*[a-zA-Z]|%\(\w+\)[a-z]")
_WORDS = re.compile(r"[A-Za-z]{3}")
# What differs between lines of one kind: addresses, digests, numbers, and what is quoted.
_VARIABLE = re.compile(r"0x[0-9a-f]+|<.*>|'[^']*'|\"[^\"]*\"|\b(?=[a-f]*\d)[0-9a-f-]{8,}\b|\d+", re.IGNORECASE)


@dataclass
class _Window:
    """Lines of one kind since `began` (seconds): how many passed and were held back, and which errors they told of."""

    began: float = -math.inf
    passed: int = 0
    held: int = 0
    errors: set[str] = field(default_factory=set)

    def is_news(self, error: str) -> bool:
        """Whether no line of the window told of this error; takes note of it."""
        if error in self.errors or len(self.errors) >= MAX_ERRORS:
            return False
        self.errors.add(error)
        return True


class HoldBack(logging.Filter):
    """Lets few lines of each kind pass in a time; the next that passes carries `held_back`, how many did not.

    Of other packages, and of Python's warnings, that is one line in `HOLD_BACK_S`; of our own warnings `OWN_LINES` in
    `OWN_S`; what we tell of progress always passes. An error that says something new passes, whatever came before, but
    for the packages that `PACKAGE_LINES` limits as a whole.
    """

    def __init__(self) -> None:
        super().__init__()
        self._windows: OrderedDict[tuple[str, ...], _Window] = OrderedDict()
        self._packages = {package: _Window() for package in PACKAGE_LINES}
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line passes; one that does says how many of its kind were held back before it."""
        is_ours = record.name.partition(".")[0] in _OURS
        if is_ours and record.levelno < logging.WARNING:
            return True
        lines, seconds = (OWN_LINES, OWN_S) if is_ours else (1, HOLD_BACK_S)
        text = message_of(record)
        with self._lock:
            window = self._window((record.name, record.levelname, _kind(record, text, is_ours), _exception(record)))
            if record.created - window.began >= seconds:
                window.began, window.passed = record.created, 0
                window.errors.clear()
            is_news = record.levelno >= logging.ERROR and window.is_news(_without_variables(text))
            if (window.passed >= lines and not is_news) or not self._package_may_speak(record):
                window.held += 1
                return False
            window.passed += 1
            if window.held:
                record.held_back, window.held = window.held, 0
        return True

    def _package_may_speak(self, record: logging.LogRecord) -> bool:
        package = record.name.partition(".")[0]
        window = self._packages.get(package)
        if window is None:
            return True
        if record.created - window.began >= OWN_S:
            window.began, window.passed = record.created, 0
        window.passed += 1
        return window.passed <= PACKAGE_LINES[package]

    def _window(self, kind: tuple[str, ...]) -> _Window:
        window = self._windows.setdefault(kind, _Window())
        self._windows.move_to_end(kind)
        if len(self._windows) > MAX_KINDS:
            self._windows.popitem(last=False)
        return window


def message_of(record: logging.LogRecord) -> str:
    """The record's text, also where template and arguments do not fit."""
    try:
        return record.getMessage()
    except Exception:  # of a library's own formatting
        return f"{record.msg} {record.args!r}"


def _kind(record: logging.LogRecord, text: str, is_ours: bool) -> str:
    """The template, where it tells kinds apart. Ours may be no more than `%s`, and are few whatever is in them."""
    template = str(record.msg)
    if is_ours or not _WORDS.search(_PLACEHOLDER.sub("", template)):
        template = text
    return _without_variables(template)


def _without_variables(text: str) -> str:
    return _VARIABLE.sub("#", text[: 4 * KIND_CHARS])[:KIND_CHARS]


def _exception(record: logging.LogRecord) -> str:
    return record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] is not None else ""
