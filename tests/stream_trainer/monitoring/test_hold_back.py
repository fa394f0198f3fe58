"""A flood of like lines: few pass, all are counted, and nothing new is lost."""

import logging

import pytest

from stream_trainer.monitoring.hold_back import (
    HOLD_BACK_S,
    MAX_ERRORS,
    MAX_KINDS,
    OWN_LINES,
    OWN_S,
    PACKAGE_LINES,
    HoldBack,
)


class Log:
    """Tells lines at a time of the test's own, and keeps those that pass."""

    def __init__(self) -> None:
        self.filter = HoldBack()
        self.now = 1000.0
        self.passed: list[str] = []

    def tell(self, name: str, level: int, template: str, *args: object, error: Exception | None = None) -> None:
        found = (type(error), error, None) if error is not None else None
        record = logging.LogRecord(name, level, "", 0, template, args, found)
        record.created = self.now
        if self.filter.filter(record):
            self.passed.append(f"{record.getMessage()} {getattr(record, 'held_back', '')}".rstrip())


@pytest.mark.parametrize("name", ["kafka.net", "urllib3.pool", "py.warnings", "stderr"])
def test_other_packages_repeat_nothing(name: str) -> None:
    log = Log()
    for second in range(100):
        log.now = 1000.0 + second
        log.tell(name, logging.WARNING, "%s", f"attempt {second} at <node {second}> of 'host-{second}' failed")
    assert len(log.passed) == 1
    log.now += HOLD_BACK_S
    log.tell(name, logging.WARNING, "%s", "attempt 7 at <node> of 'host' failed")
    log.tell(name, logging.WARNING, "%s", "another thing")
    assert log.passed[1:] == ["attempt 7 at <node> of 'host' failed 99", "another thing"]


def test_an_error_that_says_something_new_passes() -> None:
    log = Log()
    for reason in ("ECONNREFUSED 1", "ECONNREFUSED 2", "certificate expired", "ECONNREFUSED 3"):
        log.tell("kafka.net", logging.ERROR, "Connection failed: %s", reason)
    assert log.passed == ["Connection failed: ECONNREFUSED 1", "Connection failed: certificate expired 1"]
    log.tell("x", logging.ERROR, "failed", error=ValueError())
    log.tell("x", logging.ERROR, "failed", error=KeyError())
    assert log.passed[2:] == ["failed", "failed"]


def test_errors_without_end_do_not_flood_either() -> None:
    log = Log()
    for letter in "abcdefghijklmnopqrstuvwxyz":
        log.tell("urllib3.pool", logging.ERROR, "Connection failed: %s", letter * 5)
    assert len(log.passed) == MAX_ERRORS


def test_our_own_warnings_pass_now_and_then_and_what_we_tell_of_progress_always() -> None:
    log = Log()
    for second in range(59):
        log.now = 1000.0 + second
        log.tell("stream_trainer.sources.kafka", logging.WARNING, "%s; trying on", f"broker {second} is away")
        log.tell("stream_trainer.sources.kafka", logging.WARNING, "%s; trying on", "the disk is full")
        log.tell("stream_trainer.service", logging.INFO, "step %d", second)
    assert sum("broker" in line for line in log.passed) == OWN_LINES
    assert sum("disk" in line for line in log.passed) == OWN_LINES
    assert sum("step" in line for line in log.passed) == 59
    log.now += OWN_S
    log.tell("stream_trainer.sources.kafka", logging.WARNING, "%s; trying on", "broker 3 is away")
    assert log.passed[-1] == f"broker 3 is away; trying on {59 - OWN_LINES}"


def test_kinds_without_end_take_no_memory_without_end() -> None:
    log = Log()
    for number in range(3 * MAX_KINDS):
        word = "".join(chr(ord("g") + int(digit)) for digit in str(number))
        log.tell("kafka.net", logging.WARNING, f"{word} " + "long " * 10_000)
    assert len(log.filter._windows) == MAX_KINDS
    assert max(len(kind[2]) for kind in log.filter._windows) < 500


def test_an_outage_that_a_client_tells_of_in_many_ways_is_few_lines() -> None:
    log = Log()
    kinds = ("abort", "connection lost", "refresh failed", "no node", "fetch failed", "closed", "refused", "sender")
    for second in range(50):
        log.now = 1000.0 + second
        for kind in kinds:
            log.tell(f"kafka.{kind[:2]}", logging.ERROR, f"{kind}: %s", "ECONNREFUSED")
    assert log.passed == [f"{kind}: ECONNREFUSED" for kind in kinds[: PACKAGE_LINES["kafka"]]]
    log.now += OWN_S
    log.tell("kafka.other", logging.ERROR, "certificate expired")
    assert log.passed[-1] == "certificate expired"
