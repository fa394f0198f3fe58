"""Check the methods of each workload against autograd, then time them in turn."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.common.reporting import duration, say
from benchmarks.step_cost.agreement import Agreement, compare, insist
from benchmarks.step_cost.methods import REFERENCE, UNCHECKED
from benchmarks.step_cost.processes import Job, MissingError, Start, Worker
from benchmarks.step_cost.workloads import WORKLOADS, Workload


@dataclass(frozen=True)
class Options:
    """What to measure, by name, and how."""

    workloads: tuple[str, ...]
    ours: tuple[str, ...]
    against: tuple[str, ...]
    repeats: int
    threads: int
    device: str


@dataclass
class Result:
    """What was found, in the order in which it was.

    Attributes:
        runs: by workload and method: all repetitions and the peak memory (bytes).
        missing: what could not be measured, with the reason.
    """

    agreements: list[Agreement] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)


def measure(options: Options, begin: Start, keep: Callable[[Result], None] | None = None) -> Result:
    """Check, then time, every workload. `begin` starts a method; `keep` is called after each workload.

    Raises DisagreementError if our own step is wrong, MissingError if it cannot be measured.
    """
    result = Result()
    for i, name in enumerate(options.workloads):
        label = f"{name} ({i + 1} of {len(options.workloads)})"
        workload = WORKLOADS[name]
        measurable = _check(options, workload, begin, result)
        _time(options, workload, measurable, begin, result, label)
        if keep is not None:
            keep(result)
    return result


def _check(options: Options, workload: Workload, begin: Start, result: Result) -> list[str]:
    """Compare the methods' answers with the reference's; returns the methods that can be measured."""
    exact = replace(workload, dtype="float32")
    measurable = []
    with tempfile.TemporaryDirectory() as scratch:
        reference, found = Path(scratch) / "reference", Path(scratch) / "found"
        _answer(Job(REFERENCE, exact, options.device, options.threads, reference), begin)
        for method in (*options.ours, *options.against):
            if method in UNCHECKED:
                measurable.append(method)
                continue
            say(f"{workload.name}: comparing {method} with autograd")
            try:
                _answer(Job(method, exact, options.device, options.threads, found), begin)
            except MissingError as error:
                _lose(options, result, workload, method, error)
                continue
            measurable.append(method)
            agreement = compare(workload.name, method, found, reference)
            result.agreements.append(agreement)
            if method in options.ours:
                insist(agreement)
            elif not agreement.agrees:
                say(f"{workload.name}: {method} disagrees with autograd: {agreement.errors}")
    return measurable


def _answer(job: Job, begin: Start) -> None:
    begin(job).close()


def _time(
    options: Options, workload: Workload, methods: Sequence[str], begin: Start, result: Result, label: str
) -> None:
    """Interleaved repetitions of all methods."""
    repetitions: dict[str, list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for method in methods:
            say(f"{label}: starting {method}")
            try:
                worker = begin(Job(method, workload, options.device, options.threads))
            except MissingError as error:
                _lose(options, result, workload, method, error)
                continue
            stack.callback(worker.close)
            workers[method] = worker
            result.versions |= worker.ready["versions"]
        repetitions |= {method: [] for method in workers}
        for round_number in range(options.repeats):
            for method in list(repetitions):
                started = perf_counter()
                try:
                    found = workers[method].repeat()
                except MissingError as error:
                    _lose(options, result, workload, method, error)
                    del repetitions[method]
                    continue
                repetitions[method].append({**found, "repetition_s": perf_counter() - started})
                left = _time_left(options.repeats, repetitions)
                say(
                    f"{label}: round {round_number + 1} of {options.repeats}, "
                    f"{method} {found['seconds']:.3f} s a step, {left}"
                )
    result.runs += [_run(workload.name, method, found) for method, found in repetitions.items()]


def _lose(options: Options, result: Result, workload: Workload, method: str, error: MissingError) -> None:
    """A peer that fails is reported; without our own step there is nothing to report."""
    if method in options.ours:
        raise MissingError(f"{method} on {workload.name}: {error}") from error
    _miss(result, workload, method, str(error))


def _miss(result: Result, workload: Workload, method: str, reason: str) -> None:
    say(f"{workload.name}: {method} is not measured: {reason}")
    result.missing.append({"workload": workload.name, "against": method, "reason": reason})


def _time_left(repeats: int, repetitions: dict[str, list[dict[str, Any]]]) -> str:
    """What remains of this workload, from how long the repetitions took."""
    if not all(repetitions.values()):
        return "the time left is known after the first round"
    left = sum((repeats - len(found)) * median(one["repetition_s"] for one in found) for found in repetitions.values())
    return f"{duration(left)} left for this workload"


def _run(workload: str, method: str, repetitions: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [found["seconds"] for found in repetitions]
    peak = max(found["peak_bytes"] for found in repetitions)
    return {
        "workload": workload,
        "method": method,
        "seconds": seconds,
        "median_s": median(seconds),
        "peak_bytes": peak,
        "repetitions": repetitions,
    }
