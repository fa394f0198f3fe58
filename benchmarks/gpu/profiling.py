"""Where the time of a step goes, and where the host waits for the device within it."""

import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch
from gradient_selectors import engine

from benchmarks.gpu.methods import Bench, Method

LIBRARY = Path(engine.__file__).parents[1]
WAITED = "called a synchronizing CUDA operation"  # what torch then warns of


class _SynchronisedTime:
    """The engine's `time`, which waits for the GPU whenever it is asked for: at the borders of phases."""

    @staticmethod
    def perf_counter() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def synchronise(device: torch.device) -> None:
    """Wait until a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def phases(bench: Bench, method: Method) -> dict[str, float]:
    """Mean seconds of the phases of the engine's steps, and of the `optimizer` after them.

    The device is waited for at their borders, so their sum is longer than a step is otherwise.
    """
    bench.begin(method)
    found: list[dict[str, float]] = []
    with patch.object(engine, "time", _SynchronisedTime):
        for _ in range(method.steps):
            synchronise(bench.device)
            started = time.perf_counter()
            bench.step(method)
            synchronise(bench.device)
            report = bench.engine().last
            assert report is not None
            seconds = dict(report.seconds)
            found.append(seconds | {"optimizer": time.perf_counter() - started - sum(seconds.values())})
    bench.rest()
    return {phase: fmean(seconds[phase] for seconds in found) for phase in found[0]}


def synchronisations(bench: Bench, method: Method) -> list[dict[str, Any]]:
    """How often the host waits for the GPU within a step, by the place in the library, the most often first.

    It is the second step of a repetition: one with a refresh of the target's gradient only where every step has one.
    """
    bench.begin(method)
    bench.step(method)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        places = waits(lambda: bench.step(method))
    finally:
        torch.cuda.set_sync_debug_mode("default")
        bench.rest()
    return [{"place": place, "count": count} for place, count in places.most_common()]


def waits(work: Callable[[], Any]) -> Counter[str]:
    """Places of the warnings of a wait while some work is done."""
    places: Counter[str] = Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if WAITED in str(message):
            places[_place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # the context puts the old one back
        work()
    return places


def _place() -> str:
    """`file:line function` of the innermost call within the library, or else of the one that is no warning's."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename not in (warnings.__file__, __file__)]
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(LIBRARY / "gradient_selectors")]
    frame = (ours or frames)[-1]
    path = Path(frame.filename)
    shown = path.relative_to(LIBRARY) if ours else Path(*path.parts[-3:])
    return f"{shown.as_posix()}:{frame.lineno} {frame.name}"
