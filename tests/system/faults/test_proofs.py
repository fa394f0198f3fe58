"""The short forms of the proofs that `make crash-proof`, `make soak` and `make fuzz` run for long."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.brokers import why_no_apache_kafka
from tests.system.faults.fuzz import decode_all, fuzz_settings, random_records, serve_all

ROOT = Path(__file__).parents[3]


def run_proof(name: str, *options: str) -> None:
    """In a process of its own, which has no threads when it forks."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", f"tests.system.faults.{name}", *options]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("variant", "first"), [pytest.param("default", 0, marks=pytest.mark.slow), ("everything", 4)])
def test_a_run_that_is_killed_anywhere_ends_as_one_that_was_not(variant: str, first: int, tmp_path: Path) -> None:
    """Seeds of `make crash-proof`, each of which begins with another point."""
    summary = tmp_path / "summary.json"
    run_proof("crash_proof", "--seeds=4", f"--first={first}", f"--variant={variant}", f"--summary={summary}")
    found = json.loads(summary.read_text())
    assert found["runs"] == {variant: 4}
    assert found["kills"] >= 3  # one at random may come after the end
    assert not found["failures"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_record_has_one_row_in_the_ledger_wherever_a_run_is_killed(tmp_path: Path) -> None:
    summary = tmp_path / "summary.json"
    run_proof("crash_proof", "--seeds=3", "--variant=ledger", f"--summary={summary}")
    found = json.loads(summary.read_text())
    assert found["kills"] >= 2
    assert not found["failures"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_so_does_a_run_that_trains_on_while_checkpoints_are_written(tmp_path: Path) -> None:
    summary = tmp_path / "summary.json"
    run_proof("crash_proof", "--seeds=6", "--variant=asynchronous", f"--summary={summary}")
    found = json.loads(summary.read_text())
    assert found["kills"] >= 4
    assert not found["failures"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_on_three_partitions_that_is_killed_ends_as_one_that_was_not(tmp_path: Path) -> None:
    if reason := why_no_apache_kafka():
        pytest.skip(reason)
    run_proof("crash_proof", "--kafka", "--seeds=2", "--variant=everything")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_letters_are_in_the_topic_once_wherever_a_run_is_killed_on_their_way(tmp_path: Path) -> None:
    if reason := why_no_apache_kafka():
        pytest.skip(reason)
    summary = tmp_path / "summary.json"
    run_proof("crash_proof", "--kafka", "--letters", "--seeds=10", "--variant=everything", f"--summary={summary}")
    found = json.loads(summary.read_text())
    assert found["kills"] >= 12
    assert {"letter", "commit", "transaction init", "transaction begin", "transaction commit"} <= found[
        "kills_by_point"
    ].keys()
    assert found["letters_kept_twice"] == 0
    assert not found["failures"]


def test_random_records_each_have_one_outcome(tmp_path: Path) -> None:
    counts = serve_all(random_records(2000, seed=0), tmp_path)
    assert min(counts["trained"], counts["not_selected"], counts["dead_lettered"]) > 0


def test_random_records_are_the_same_for_the_same_seed() -> None:
    values = random_records(300, seed=1)
    assert values == random_records(300, seed=1)
    assert len({type(result) for result in decode_all(values)}) == 2


def test_any_tree_gives_settings_or_lines_that_say_what_is_wrong(tmp_path: Path) -> None:
    fuzz_settings(60, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_grows_or_is_lost_while_the_broker_restarts() -> None:
    """Too short to see a slow leak of memory; threads, descriptors and the ledger count in full."""
    if reason := why_no_apache_kafka():
        pytest.skip(reason)
    run_proof("soak", "--minutes=0.5", "--restart-seconds=12", "--growth=0.15")
