"""Have groups make steps in turn, within a limit of time, and sum up what they took."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.common.reporting import duration, say
from benchmarks.scale_out import paper
from benchmarks.scale_out.check import check
from benchmarks.scale_out.groups import Group, group
from benchmarks.scale_out.plan import METHODS, SHARE_KEPT, Setting, Workload, settings_of

Key = tuple[Setting, str]
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # bytes from which glibc gives freed memory back at once
SHARE_OF_TIME = 0.7  # for what is timed; memory is measured after it


@dataclass
class Result:
    """What was found.

    Attributes:
        weights: that the model trains.
        runs: by setting and method.
    """

    weights: int = 0
    agreement: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)


def measure(workload: Workload, ranks: Sequence[int], device: str, repeats: int, deadline: float) -> Result:
    """Check, time in turn, then see what memory is taken. Raises DisagreementError and LostError."""
    settings, result, began = settings_of(workload, ranks), Result(), time.monotonic()
    with ExitStack() as up, tempfile.TemporaryDirectory(prefix="scale-out-") as folder:
        say(f"starting groups of {', '.join(map(str, ranks))} ranks")
        groups = {size: up.enter_context(group(workload, size, device)) for size in ranks}
        result.weights = groups[ranks[0]].weights
        say("checking that all compute the same")
        result.agreement = check(groups, workload.pool, device, Path(folder))
        say("seconds by phase")
        phased = _round(groups, settings, phases=True)  # and the first round, which is not counted
        timed = _in_turn(groups, settings, repeats, began + SHARE_OF_TIME * (deadline - began))
    peaks: dict[Key, list[dict[str, Any]]] = {}
    for size in ranks:
        say(f"memory of {size} ranks")
        with group(workload, size, device, **MAPPED) as alone:
            peaks |= _round({size: alone}, [one for one in settings if one.ranks == size], phases=False)
    result.runs = [_row(workload, key, timed[key], phased[key], peaks[key], result.weights) for key in timed]
    return result


def _in_turn(
    groups: Mapping[int, Group], settings: Sequence[Setting], repeats: int, deadline: float
) -> dict[Key, list[list[dict[str, Any]]]]:
    """Rounds while there is time, one at least."""
    took, rounds = 0.0, list[dict[Key, list[dict[str, Any]]]]()
    while not rounds or (len(rounds) < repeats and time.monotonic() + took < deadline):
        say(f"round {len(rounds) + 1} of at most {repeats}, {duration(max(0.0, deadline - time.monotonic()))} left")
        started = time.monotonic()
        rounds.append(_round(groups, settings, phases=False))
        took = time.monotonic() - started
    return {key: [found[key] for found in rounds] for key in rounds[0]}


def _round(
    groups: Mapping[int, Group], settings: Sequence[Setting], *, phases: bool
) -> dict[Key, list[dict[str, Any]]]:
    """One repetition of every method in every setting, with the answers of all ranks; one group works at a time."""
    return {
        (one, method): groups[one.ranks].ask("repeat", method=method, pool=one.pool, phases=phases)
        for method in METHODS
        for one in settings
    }


def _row(
    workload: Workload,
    key: Key,
    timed: Sequence[Sequence[Mapping[str, Any]]],
    phased: Sequence[Mapping[str, Any]],
    peaks: Sequence[Mapping[str, Any]],
    weights: int,
) -> dict[str, Any]:
    """What a method came to: seconds are those of the slowest rank, bytes the mean of ranks and repetitions."""
    setting, method = key
    seconds = [max(rank["seconds"] for rank in ranks) for ranks in timed]
    every = [rank["sent"] for ranks in timed for rank in ranks]
    sent = {kind: fmean(one.get(kind, 0) for one in every) for kind in sorted({k for one in every for k in one})}
    known = [rank["peak_bytes"] for rank in peaks if rank["peak_bytes"] is not None]
    row = {
        **asdict(setting),
        "method": method,
        "seconds": seconds,
        "median_s": median(seconds),
        "tokens_per_s": setting.pool * workload.tokens / median(seconds),
        "sent_bytes": sum(sent.values()),
        "sent": sent,
        "phases": phased[0]["phases"],
        "exchange": phased[0]["exchange"],
        "peak_bytes": max(known, default=None),
    }
    if setting.ranks > 1:
        row["measured"] = paper.measured(sent, weights, setting.ranks, setting.pool // SHARE_KEPT)
    return row


def summarise(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Ratios: of time to one rank, of bytes, time and memory to the plain step of the same setting."""
    found = {(run["kind"], run["ranks"], run["method"]): run for run in runs}
    rows = []
    for (kind, ranks, method), run in found.items():
        alone, plain = found[("one", 1, method)], found[(kind, ranks, "plain")]
        grown = run["pool"] / alone["pool"]
        row = {"kind": kind, "ranks": ranks, "method": method}
        row |= {"speedup": grown * alone["median_s"] / run["median_s"], "time": run["median_s"] / plain["median_s"]}
        bytes_of = (run["sent_bytes"], plain["sent_bytes"])
        row["sent"] = bytes_of[0] / bytes_of[1] if bytes_of[1] else None
        peaks = (run["peak_bytes"], plain["peak_bytes"])
        row["peak"] = None if None in peaks else peaks[0] / peaks[1]
        rows.append(row)
    return rows
