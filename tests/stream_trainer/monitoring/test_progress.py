"""How far a run is, from what it tells; and how that is shown."""

import io
import logging
import math
from dataclasses import replace

import pytest
from rich.console import Console

from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.monitoring.pages import Health
from stream_trainer.monitoring.panel import LEAST_LINES, duration, fields, panel
from stream_trainer.monitoring.progress import Loss, Now, Phase, Progress, announced


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def begun(state: str = "training", detail: str = "") -> tuple[Progress, Clock, Metrics]:
    clock, metrics = Clock(), Metrics()
    progress = Progress(clock)
    progress.begin(metrics, lambda: Health(state, ok=True, ready=True, detail=detail))
    return progress, clock, metrics


def test_nothing_is_known_before_a_run_begins() -> None:
    now = Progress(Clock()).now()
    assert (now.state, now.step, now.lag, now.pool, dict(now.sets)) == ("starting", None, None, None, {})
    assert fields(now) == {"state": "starting", "doing_s": 0.0, "doing": "starting"}


def test_rates_losses_and_shares() -> None:
    progress, clock, _ = begun()
    progress.evaluated(40, {"target": 3.0, "retention": 1.0})
    for step in range(41, 61):
        clock.now += 0.5
        progress.stepped(step, 100, [2.0, 4.0, math.nan], chosen=0.25, gain=0.75)
    progress.evaluated(60, {"target": 2.5, "retention": 1.1})
    now = progress.now()
    assert (now.step, now.steps_per_s, now.tokens_per_s) == (60, 2.0, 200.0)
    assert (now.pool, now.chosen, now.gain) == (Loss(3.0, 3.0), 0.25, 0.75)
    assert dict(now.sets) == {"target": Loss(3.0, 2.5), "retention": Loss(1.0, 1.1)}
    assert now.doing == "step 61"
    clock.now += 30  # a step that hangs
    now = progress.now()
    assert now.steps_per_s == 0.5
    assert now.doing_s == 30.0


def test_time_to_drain_is_lag_over_its_fall() -> None:
    progress, clock, metrics = begun()
    assert progress.now().drain_s is None
    for lag in (1000, 900, 800, 700):
        metrics.lag.set(lag - 100, "t", "0")
        metrics.lag.set(100, "t", "1")
        found = progress.now()
        clock.now += 5
    assert found.lag == 700
    assert found.drain_s == pytest.approx(700 / 20)
    metrics.lag.set(5000, "t", "0")
    assert progress.now().drain_s is None  # it grows
    metrics.lag.set(0, "t", "0")
    metrics.lag.set(0, "t", "1")
    assert progress.now().drain_s == 0.0


def test_what_it_is_doing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    progress, clock, _ = begun()
    progress.phase(Phase("evaluating target", 0, 64))
    clock.now += 2
    progress.phase(Phase("evaluating target", 16, 64))
    now = progress.now()
    assert (now.doing, now.doing_s) == ("evaluating target 16/64", 2.0)
    progress.phase(Phase("evaluating target", 64, 64, seconds=0.2))
    assert caplog.messages == ["evaluating target, 64 samples", "evaluating target: done in 0.2 s"]
    progress.phase(Phase("evaluating target", 0, 64))  # was short the last time: nothing is said
    progress.phase(Phase("evaluating target", 64, 64, seconds=0.2))
    assert len(caplog.messages) == 2
    assert progress.now().doing == "training" or progress.now().step is None


def test_an_announced_phase_has_a_line_at_its_begin_and_one_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with announced("loading libraries"):
        assert caplog.messages == ["loading libraries"]
    assert caplog.messages[1].startswith("loading libraries: done in ")


def far() -> Now:
    losses = {"target": Loss(3.4, 2.9), "retention": Loss(1.0, 1.2), "a-set-with-a-very-long-name": Loss(1.0, 1.0)}
    return Now(
        state="catching_up",
        doing="evaluating target 16/64",
        doing_s=12.0,
        trouble="fails for 30 s: checkpoint.dir=/mnt/disk: No space left on device; " * 5,
        up_s=4000.0,
        step=1234,
        steps_per_s=2.34,
        tokens_per_s=12345.6,
        lag=9_876_543.0,
        drain_s=5400.0,
        pool=Loss(3.0, 2.0),
        sets=losses,
        chosen=0.25,
        gain=0.8,
    )


def drawn(now: Now, width: int, height: int = 40) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(panel(now, "stream-trainer · a-topic", width, height))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return str(text).splitlines()


@pytest.mark.parametrize("width", [60, 80, 131, 132, 200])
def test_a_panel_fits_and_says_it_all(width: int) -> None:
    lines = drawn(far(), width)
    assert {len(line) for line in lines} == {width}
    text = "\n".join(lines)
    for part in ("catching up", "1,234", "evaluating target 16/64, for 12 s", "2.900   at the start 3.400", "-0.500"):
        assert part in text
    if width >= 80:
        for part in ("lag 9,876,543   drained in 1.5 h", "25% of the pool   80% of the pull last measured", "No space"):
            assert part in text


def test_a_wide_terminal_is_used() -> None:
    assert len(drawn(far(), 200)) < len(drawn(far(), 80))


@pytest.mark.parametrize(("width", "height"), [(40, 40), (80, LEAST_LINES - 1)])
def test_a_small_terminal_gets_one_line(width: int, height: int) -> None:
    (line,) = drawn(far(), width, height)
    assert line.startswith("catching_up  step 1,234")
    assert len(line) < width


def test_a_panel_of_what_is_not_known_yet() -> None:
    lines = drawn(Progress(Clock()).now(), 80)
    assert "nan" not in "".join(lines)
    assert any("now" in line and "starting" in line for line in lines)


def test_fields_are_numbers_in_base_units() -> None:
    found = fields(replace(far(), trouble="", pool=Loss(math.nan, 2.0)))
    assert found["steps_per_s"] == 2.34
    assert found["drain_s"] == 5400
    assert (found["target_loss"], found["target_loss_at_start"]) == (2.9, 3.4)
    assert "trouble" not in found
    assert "pool_loss_at_start" not in found


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0, 59, 90, 5400, 200_000)] == ["0 s", "59 s", "2 min", "1.5 h", "2.3 d"]
