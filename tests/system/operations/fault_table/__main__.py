"""Do each fault to a running trainer, and say what an operator sees of it, and when.

    python -m tests.system.operations.fault_table --json FILE [--only hang,nan]

A fault lasts for about a minute, and is then undone. Measured are the seconds until `/healthz` says something, until
the condition of the fault's alert holds in a real Prometheus, until the alert fires with waits that are shorter by a
factor, and, from the moment that it is undone, until all is well again. FILE keeps the rows of faults that are not done
now. Needs `prometheus` on the PATH and an Apache Kafka at KAFKA_HOME; for the full disk one has to be root.

Exit codes: 0 all is as it should be, 1 something is not, 2 something is missing here, time included.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from deploy.as_processes import waiting
from tests.helpers.service import checkpoints
from tests.system.operations.fault_table.faults import FAULTS, Fault, TooBusyError, can_mount, mount, unmount
from tests.system.operations.fault_table.report import as_markdown, what_is_wrong
from tests.system.operations.fault_table.stage import FACTOR, Stage, stage, why_not
from tests.system.operations.fault_table.watching import Watch, most_lines

QUIET_S = 20.0  # watched before the fault


@dataclass(frozen=True)
class Row:
    """What was seen of a fault; seconds are from its beginning, those of `recovered_s` from its end.

    Attributes:
        health: the words of `/healthz` in their order, from before the fault on.
        condition_s: until the alert's condition held; with `wait_s`, its waits as deployed, until it would fire.
        fired_s: until it did fire, with shorter waits.
        others: further alerts that would have fired as deployed.
        lines_before, lines: of the log in the worst minute, without and with the fault.
        recovered_s: until it was healthy and had a newer checkpoint; None if that needs a restart.
    """

    name: str
    title: str
    health: list[str]
    health_s: float | None
    reason: str
    alert: str | None
    condition_s: float | None
    wait_s: float
    fired_s: float | None
    others: list[str]
    lines_before: int
    lines: int
    recovered_s: float | None
    factor: int = FACTOR


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--only", metavar="NAMES", help=f"of {', '.join(fault.name for fault in FAULTS)}")
    options = parser.parse_args()
    if missing := why_not():
        print(f"error: {missing}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends, too
    names = options.only.split(",") if options.only else [fault.name for fault in FAULTS]
    rows = json.loads(options.json.read_text()) if options.json.exists() else {}
    wanted = [fault for fault in FAULTS if fault.name in names and (can_mount() or not fault.needs_disk)]
    while wanted:  # a trainer that has ended is followed by another one
        with tempfile.TemporaryDirectory(prefix="stream-trainer-fault-") as folder:
            try:
                for row in suffer(Path(folder), wanted):
                    rows[row.name] = asdict(row)
                    options.json.write_text(json.dumps(rows, indent=1) + "\n")
            except TooBusyError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
    found = [rows[fault.name] for fault in FAULTS if fault.name in rows]
    print(as_markdown(found))
    wrong = [line for row in found if row["name"] in names for line in what_is_wrong(row)]
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


def suffer(folder: Path, wanted: list[Fault]) -> Iterator[Row]:
    """Do faults to one trainer for as long as it lives, and say what was seen; those that were done are taken out."""
    disk = folder / "disk"
    try:
        if can_mount():
            mount(disk)
        with stage(folder, disk / "checkpoints") as running, Watch(running) as watch:
            while wanted and running.trainer.poll() is None:
                yield _suffer(wanted.pop(0), running, watch)
    finally:
        unmount(disk)


def _suffer(fault: Fault, running: Stage, watch: Watch) -> Row:
    _say(fault, "waiting until all is well")
    waiting("health without a fault", lambda: watch.is_well() and fault.alert not in watch.active())
    quiet = time.time()
    time.sleep(QUIET_S)
    _say(fault, "begins")
    seen_before, began = len(watch.health), time.time()
    fault.do(running)
    if fault.alert is not None:
        waiting(fault.alert, lambda: _firing(watch, fault.alert))
    time.sleep(max(0.0, began + fault.hold_s - time.time()))
    ended = time.time()
    others = [name for name in watch.alerts if name != fault.alert and _would_fire(running, watch, name, began)]
    kept = checkpoints(running.config)[-1]
    fault.undo(running)
    _say(fault, "is undone")
    recovered = _recovered(fault, running, watch, kept)
    changes = watch.health[seen_before:]
    told = next((seen for seen in changes if seen.health != "healthy" or seen.detail), None)
    worst = max((seen for seen in changes), key=lambda seen: (_rank(seen.health), bool(seen.detail)), default=None)
    alert = watch.alerts.get(fault.alert or "")
    return Row(
        fault.name,
        fault.title,
        health=_without_repeats(["healthy", *(seen.health for seen in changes)]),
        health_s=None if told is None else round(told.at - began, 1),
        reason="" if worst is None else worst.detail.replace(str(running.folder), "…"),
        alert=fault.alert,
        condition_s=None if alert is None else round(alert.active - began, 1),
        wait_s=running.waits.get(fault.alert or "", 0.0),
        fired_s=None if alert is None or alert.firing is None else round(alert.firing - began, 1),
        others=others,
        lines_before=round(most_lines(running.log, quiet, began) * 60 / QUIET_S),
        lines=most_lines(running.log, began, ended),
        recovered_s=recovered,
    )


def _recovered(fault: Fault, running: Stage, watch: Watch, kept: Path) -> float | None:
    """Seconds from now until all is well; None if the process has ended, or nothing gets well."""

    def is_well() -> bool:
        gone = fault.stays or fault.alert is None or fault.alert not in watch.active()
        works = checkpoints(running.config)[-1] != kept
        return running.trainer.poll() is not None or (watch.is_well() and gone and works)

    try:
        seconds = waiting(f"{fault.title}: its end", is_well)
    except TimeoutError:
        return None
    return seconds if running.trainer.poll() is None else None


def _firing(watch: Watch, name: str | None) -> bool:
    found = watch.alerts.get(name or "")
    return found is not None and found.firing is not None


def _would_fire(running: Stage, watch: Watch, name: str, began: float) -> bool:
    """Whether an alert's condition came to hold, and for as long as it waits where it is deployed."""
    found = watch.alerts[name]
    return found.active >= began and (found.gone or time.time()) - found.active >= running.waits[name]


def _rank(health: str) -> int:
    return ["healthy", "starting", "degraded", "stuck", "no answer"].index(health)


def _without_repeats(words: list[str]) -> list[str]:
    return [word for i, word in enumerate(words) if i == 0 or word != words[i - 1]]


def _say(fault: Fault, what: str) -> None:
    print(f"{fault.title}: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
