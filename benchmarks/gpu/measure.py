"""Time the methods of each case in turn, within a limit of time that holds for all cases together."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

import torch

from benchmarks.common.reporting import duration, say
from benchmarks.gpu.methods import METHODS, Bench, Method
from benchmarks.gpu.models import UnmeasuredError
from benchmarks.gpu.profiling import phases, synchronise
from benchmarks.gpu.shapes import Case

ROUNDS_NEEDED = 3  # the one that is not counted, one that is, and the profiled one
SHARE_USED = 0.9  # of the time that is left: an estimate may be too low
SHARE_OF_EQUAL = 0.5  # of the time for each case if all took the same: those to come are dearer


@dataclass(frozen=True)
class Repetition:
    """Some steps of a method.

    Attributes:
        seconds: of one step.
        selected: samples in an update, the mean.
        rest_bytes: memory of the device before the steps, that of weights and moments; None on a CPU.
        peak_bytes: the most memory during the steps; None on a CPU.
    """

    seconds: float
    selected: float
    rest_bytes: int | None
    peak_bytes: int | None


@dataclass
class Result:
    """What was found, in the order in which it was.

    Attributes:
        runs: by case and method: all repetitions, and the phases of a step that scores.
        missing: what could not be measured, with the reason; `method` is None where that holds for the whole case.
    """

    runs: list[dict[str, Any]] = field(default_factory=list)
    missing: list[dict[str, Any]] = field(default_factory=list)

    def miss(self, case: Case, method: str | None, reason: str) -> None:
        say(f"{case.name}: {method or 'the case'} is left out: {reason}")
        self.missing.append({"shape": case.shape.name, "tokens": case.tokens, "method": method, "reason": reason})


@dataclass
class Budget:
    """The time that is left.

    Attributes:
        deadline: when all must have ended, on the clock of `time.monotonic`.
        pace: seconds of a round for a unit of work, of the last case that no method failed on; 0 before the first.
    """

    deadline: float
    pace: float = 0.0

    @property
    def left(self) -> float:
        return SHARE_USED * (self.deadline - time.monotonic())

    def note(self, seconds: float, case: Case, methods: Sequence[Method]) -> None:
        """Keep the pace of a round, unless a method was missing from it."""
        if len(methods) == len(METHODS):
            self.pace = seconds / case.work

    def refusal(self, seconds: float) -> str | None:
        """Why there is no time for something that takes so long; None if there is."""
        if seconds < self.left:
            return None
        return f"it takes about {duration(seconds)} and {duration(max(0.0, self.left))} are left; raise --minutes"


def measure(
    cases: Sequence[Case], device: torch.device, budget: Budget, repeats: int, keep: Callable[[Result], None]
) -> Result:
    """Time every case that there is time and memory for. `keep` is called after each."""
    result = Result()
    for i, case in enumerate(cases):
        if refusal := budget.refusal(ROUNDS_NEEDED * budget.pace * case.work):
            result.miss(case, None, refusal)
        else:
            say(f"{case.name} ({i + 1} of {len(cases)}), {duration(budget.left)} left")
            until = time.monotonic() + SHARE_OF_EQUAL * budget.left / (len(cases) - i)
            reason = _failure(lambda: _measure_case(Bench(case, device), budget, repeats, until, result))  # noqa: B023
            if reason is not None:
                result.miss(case, None, reason)
            _free(device)
        keep(result)
    return result


def _measure_case(bench: Bench, budget: Budget, repeats: int, until: float, result: Result) -> None:
    """A round that is not counted, one that is, and more until that time."""
    started = time.monotonic()
    methods = list(_round(bench, METHODS, result))
    took = time.monotonic() - started
    budget.note(took, bench.case, methods)
    if refusal := budget.refusal(took):
        raise UnmeasuredError(refusal)
    rounds: list[dict[Method, Repetition]] = []
    while len(rounds) < repeats and (not rounds or time.monotonic() + took < until):
        say(f"{bench.case.name}: round {len(rounds) + 1} of at most {repeats}")
        started = time.monotonic()
        rounds.append(_round(bench, methods, result))
        took, methods = time.monotonic() - started, list(rounds[-1])
    budget.note(took, bench.case, methods)
    for method in methods:
        row = _row(bench, method, [found[method] for found in rounds])
        if method.refresh_steps is not None and budget.refusal(took) is None:
            row["phases"] = phases(bench, method)
        result.runs.append(row)


def _round(bench: Bench, methods: Sequence[Method], result: Result) -> dict[Method, Repetition]:
    """One repetition of each method; those that fail are missing from it."""
    found: dict[Method, Repetition] = {}
    for method in methods:
        reason = _failure(lambda: found.update({method: repetition(bench, method)}))  # noqa: B023
        bench.rest()
        if reason is not None:
            _free(bench.device)
            result.miss(bench.case, method.name, reason)
    return found


def _failure(work: Callable[[], None]) -> str | None:
    """Do some work; why it cannot be done here, or None. What it held is let go with the error."""
    try:
        work()
    except UnmeasuredError as error:
        return str(error)
    except torch.OutOfMemoryError as error:
        return f"out of memory: {str(error).partition('. GPU')[0]}"
    return None


def repetition(bench: Bench, method: Method) -> Repetition:
    """Steps from one refresh of the target to the next. Raises UnmeasuredError for what is no step."""
    bench.begin(method)
    on_gpu = bench.device.type == "cuda"
    rest = torch.cuda.memory_allocated(bench.device) if on_gpu else None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(bench.device)
    synchronise(bench.device)
    started = time.perf_counter()
    selected = [bench.step(method) for _ in range(method.steps)]
    synchronise(bench.device)
    seconds = (time.perf_counter() - started) / method.steps
    peak = torch.cuda.max_memory_allocated(bench.device) if on_gpu else None
    return Repetition(seconds, fmean(selected), rest, peak)


def _row(bench: Bench, method: Method, found: Sequence[Repetition]) -> dict[str, Any]:
    """What a method came to; tokens a second are those of all candidates."""
    case, samples, seconds = bench.case, method.samples(bench.case), median(one.seconds for one in found)
    return {
        "shape": case.shape.name,
        "tokens": case.tokens,
        "method": method.name,
        "samples": samples,
        "selected": fmean(one.selected for one in found),
        "median_s": seconds,
        "tokens_per_s": samples * case.tokens / seconds,
        "rest_bytes": found[0].rest_bytes,
        "peak_bytes": max((one.peak_bytes for one in found if one.peak_bytes is not None), default=None),
        "repetitions": [asdict(one) for one in found],
    }


def _free(device: torch.device) -> None:
    """Give memory back to the device; hooks and the modules that they are on hold each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
