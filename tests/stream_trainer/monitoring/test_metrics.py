"""Names follow Prometheus' conventions, and what an alert needs is there from the start."""

import re
import shutil
import subprocess

import pytest
from prometheus_client import generate_latest

from stream_trainer.monitoring.metrics import PREFIX, SAMPLE_NOTES, Metrics
from stream_trainer.records import Outcome
from stream_trainer.samples.decoder import NOTES


def families() -> list[tuple[str, str, list[str]]]:
    """Name, type and sample names of everything of ours."""
    return [
        (family.name, family.type, [sample.name for sample in family.samples])
        for family in Metrics(("not_json",), arms=2).registry.collect()
        if family.name.startswith(PREFIX)
    ]


def test_names_have_base_units_and_counters_end_in_total() -> None:
    for name, kind, samples in families():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
        assert not re.search(r"_(ms|milliseconds|minutes|percent|gib|mib|kb|mb|per_second)(_|$)", name), name
        if kind == "counter":
            assert all(sample.endswith("_total") for sample in samples)
        else:
            assert not name.endswith("_total")


def test_every_counter_is_there_before_anything_is_counted() -> None:
    assert [name for name, kind, samples in families() if kind == "counter" and not samples] == []
    assert list(NOTES) == list(SAMPLE_NOTES)


def test_every_outcome_and_reason_has_its_series() -> None:
    registry = Metrics(("not_json",)).registry
    for outcome in Outcome:
        assert registry.get_sample_value(f"{PREFIX}_records_total", {"outcome": outcome.value}) == 0
    assert registry.get_sample_value(f"{PREFIX}_dead_letters_total", {"reason": "not_json"}) == 0


def test_every_metric_is_explained() -> None:
    for family in Metrics().registry.collect():
        assert len(family.documentation) > 10, family.name


def test_two_services_do_not_share_metrics() -> None:
    one, other = Metrics(), Metrics()
    one.records_read.inc()
    assert other.registry.get_sample_value(f"{PREFIX}_records_read_total") == 0


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool, of Prometheus, is not on the PATH")
def test_promtool_has_no_complaint() -> None:
    metrics = generate_latest(Metrics(("not_json",)).registry)
    check = subprocess.run(["promtool", "check", "metrics"], input=metrics, capture_output=True, timeout=60)
    assert (check.returncode, check.stdout + check.stderr) == (0, b"")
