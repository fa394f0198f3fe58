"""Lines as people and collectors read them."""

import io
import json
import logging
import math
import warnings
from collections.abc import Iterator

import pytest

from stream_trainer.monitoring.hold_back import OWN_LINES
from stream_trainer.monitoring.logs import MAX_LINE_CHARS, Printed, configure_logging
from stream_trainer.settings.schema import LogSettings


@pytest.fixture(autouse=True)
def _untouched_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in ("kafka", "httpx", "transformers")}
    yield
    root.handlers[:], root.level = handlers, level
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)
    logging.captureWarnings(False)


def test_json_lines_carry_the_extra_fields() -> None:
    out = io.StringIO()
    configure_logging(LogSettings(format="json"), out)
    logging.getLogger("stream_trainer.trainer").info("step %d done", 3, extra={"step": 3, "path": object})
    (line,) = out.getvalue().splitlines()
    fields = json.loads(line)
    assert fields["time"].endswith("Z")
    assert (fields["level"], fields["logger"], fields["message"]) == (
        "INFO",
        "stream_trainer.trainer",
        "step 3 done",
    )
    assert (fields["step"], fields["path"]) == (3, str(object))


def test_a_traceback_stays_on_the_json_line() -> None:
    out = io.StringIO()
    configure_logging(LogSettings(format="json"), out)
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger("x").exception("failed")
    (line,) = out.getvalue().splitlines()
    assert "ValueError: no" in json.loads(line)["exception"]


def test_text_lines() -> None:
    out = io.StringIO()
    configure_logging(LogSettings(), out)
    logging.getLogger("x").warning("slow", extra={"step": 3})
    assert out.getvalue().endswith("Z WARNING x: slow step=3\n")


def test_levels_and_noise() -> None:
    out = io.StringIO()
    configure_logging(LogSettings(level="DEBUG"), out)
    configure_logging(LogSettings(level="INFO"), out)  # again: one handler, not two
    logging.getLogger("kafka.client").info("connecting")
    logging.getLogger("x").debug("detail")
    logging.getLogger("x").info("once")
    assert [line.rpartition(" ")[2] for line in out.getvalue().splitlines()] == ["once"]


def test_transformers_logs_through_us(capsys: pytest.CaptureFixture[str]) -> None:
    out = io.StringIO()
    configure_logging(LogSettings(format="json"), out)
    logging.getLogger("transformers.modeling_utils").warning("weights are new")
    logging.getLogger("transformers.modeling_utils").info("loading")
    assert [json.loads(line)["message"] for line in out.getvalue().splitlines()] == ["weights are new"]
    assert capsys.readouterr().err == ""


def test_warnings_are_logged() -> None:
    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        configure_logging(LogSettings(), out)
        warnings.warn("old option", UserWarning, stacklevel=1)
    assert "WARNING py.warnings:" in out.getvalue()
    assert "old option" in out.getvalue()


def test_the_kafka_client_does_not_flood_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    configure_logging(LogSettings(), out)
    clock = 1000.0
    make = logging.LogRecord.__init__

    def stamped(record: logging.LogRecord, *args: object, **options: object) -> None:
        make(record, *args, **options)  # type: ignore[arg-type]
        record.created = clock

    monkeypatch.setattr(logging.LogRecord, "__init__", stamped)
    kafka, ours = logging.getLogger("kafka.net.manager"), logging.getLogger("stream_trainer.sources.kafka")
    for second in range(60):
        clock += 1
        for node in range(5):
            kafka.error("Connection failed: %s", f"ECONNREFUSED {node}")
            kafka.warning(f"<KafkaConnection node_id={node} attempt={second}> Bootstrap failed")
        ours.warning("cannot be read for now")
    lines = out.getvalue().splitlines()
    assert sum("kafka.net.manager" in line for line in lines) == 2
    assert sum("cannot be read for now" in line for line in lines) == OWN_LINES
    assert len(lines) <= 20
    clock += 300
    kafka.error("Connection failed: %s", "again")
    assert out.getvalue().endswith("Connection failed: again held_back=299\n")


def test_json_is_json_whatever_is_told() -> None:
    """NaN is no JSON, a library's own template may not fit its arguments, and a value may hold itself."""
    out = io.StringIO()
    configure_logging(LogSettings(format="json"), out)
    itself: list[object] = []
    itself.append(itself)
    log = logging.getLogger("x")
    log.info("one", extra={"loss": math.nan, "losses": [math.inf], "time": "not this one"})
    log.info("two", extra={"keys": {(1, 2): 3}, "itself": itself})
    log.info("three %d", "no number")
    log.info("four\nfive", stack_info=True)
    found = [json.loads(line, parse_constant=pytest.fail) for line in out.getvalue().splitlines()]
    assert [fields["message"] for fields in found] == ["one", "two", "three %d ('no number',)", "four\nfive"]
    assert found[0]["loss"] is None
    assert found[0]["time"].endswith("Z")
    assert "test_logs.py" in found[3]["stack"]


def test_what_is_printed_becomes_a_record_a_line() -> None:
    out = io.StringIO()
    configure_logging(LogSettings(format="json"), out)
    printed = Printed(out)
    printed.write("50%\r100%\nhalf of ")
    printed.write("a line\n\n")
    printed.write("x" * (MAX_LINE_CHARS + 1))
    messages = [json.loads(line)["message"] for line in out.getvalue().splitlines()]
    assert messages == ["50%", "half of a line", "x" * (MAX_LINE_CHARS + 1)]
