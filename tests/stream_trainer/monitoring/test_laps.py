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
    metrics.phase_seconds.inc(7, "evaluate")  # before it began
    rest = Rest(metrics, lambda: next(times))
    spent = metrics.phase_seconds.by_labels
    metrics.phase_seconds.inc(8, "train")
    rest.note()
    assert spent["other",] == 2
    metrics.phase_seconds.inc(4, "train")
    metrics.phase_seconds.inc(3, "checkpoint")
    rest.note()
    assert spent["other",] == 5
    metrics.phase_seconds.inc(11, "train")  # a clock of another kind: time never goes back
    rest.note()
    assert spent["other",] == 5
