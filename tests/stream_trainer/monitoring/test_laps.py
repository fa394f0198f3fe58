"""Where the time of a thread goes."""

from stream_trainer.monitoring.laps import Laps, Rest
from stream_trainer.monitoring.metrics import Metrics


def test_every_moment_has_one_name() -> None:
    metrics, times = Metrics(), iter([10.0, 11.0, 13.5, 14.0])
    laps = Laps(metrics, lambda: next(times))
    for name in ("wait", "decode", "wait"):
        laps.lap(name)
    (family,) = metrics.reading_seconds.collect()
    found = {sample.labels["activity"]: sample.value for sample in family.samples}
    assert found == {"wait": 1.5, "decode": 2.5, "hold": 0, "commit": 0, "other": 0}


def test_what_no_phase_has_is_other_and_phases_sum_to_wall_time() -> None:
    metrics, times = Metrics(), iter([100.0, 110.0, 120.0, 130.0])
    metrics.phase_seconds.labels("evaluate").inc(7)  # before it began
    rest = Rest(metrics, lambda: next(times))
    other = metrics.phase_seconds.labels("other")
    metrics.phase_seconds.labels("train").inc(8)
    rest.note()
    assert other._value.get() == 2
    metrics.phase_seconds.labels("train").inc(4)
    metrics.phase_seconds.labels("checkpoint").inc(3)
    rest.note()
    assert other._value.get() == 5
    metrics.phase_seconds.labels("train").inc(11)  # a clock of another kind: time never goes back
    rest.note()
    assert other._value.get() == 5
