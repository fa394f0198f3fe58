"""The ledger of a whole run: a row for each record, as the trainer decided, and no other training than without it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ledgers import generate
from tests.helpers.service import configuration, counts, goods, jsonl, serve_until, write_lines
from tests.system.faults.ends import differences, newest
from tests.system.faults.test_proofs import ROOT, run_proof


def config_of(folder: Path, stream: Path, *, ledger: bool) -> dict[str, Any]:
    folder.mkdir()
    checkpoint = {"dir": str(folder / "checkpoints"), "every_steps": 3}
    return configuration(folder, jsonl(stream), checkpoint=checkpoint, ledger={"enabled": ledger})


def test_every_record_has_a_row_and_training_is_the_same(tmp_path: Path) -> None:
    from stream_trainer.ledger.query import rows_where

    stream = tmp_path / "samples.jsonl"
    write_lines(stream, [b"not JSON" if i % 6 == 5 else value for i, value in enumerate(goods(96))])
    kept = config_of(tmp_path / "with", stream, ledger=True)
    plain = config_of(tmp_path / "without", stream, ledger=False)
    _, steps = serve_until(kept)
    serve_until(plain)
    assert not list(differences(newest(kept), newest(plain)))
    assert not (tmp_path / "without" / "checkpoints" / "ledger").exists()
    found = rows_where(tmp_path / "with" / "checkpoints", {"partition": 0}, 1000).rows
    assert len({row["offset"] for row in found}) == len(found) == 96
    for outcome, number in counts(kept).items():
        assert sum(row["outcome"] == outcome for row in found) == number
    given = {(step.number, id): c for step in steps for id, c in zip(step.ids, step.coefficients, strict=True)}
    rows = {(row["step"], row["id"]): row for row in found if row["outcome"] != "dead_lettered"}
    assert rows.keys() == given.keys()
    assert all(rows[key]["coefficient"] == pytest.approx(given[key], rel=1e-6) for key in given)
    assert all((rows[key]["outcome"] == "trained") == (given[key] > 0) for key in given)
    assert {row["reason"] for row in found if row["outcome"] == "dead_lettered"} == {"bad_json"}


def test_a_run_without_a_ledger_loads_no_parquet(tmp_path: Path) -> None:
    code = "import sys, stream_trainer.service, stream_trainer.commands.ledger; print('pyarrow' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_the_command_loads_nothing_that_takes_longer_than_its_answer(tmp_path: Path) -> None:
    """With torch and what comes with it, an answer of a third of a second took eight."""
    generate(tmp_path, 100)
    code = (
        "import sys; from stream_trainer.cli import main; main(sys.argv[1:]); "
        "print({'torch', 'transformers', 'cvxpy', 'kafka', 'pydantic'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, "ledger", "show", f"--dir={tmp_path}", "--partition=3", "--offset=5"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert found[1].split()[:3] == ["samples", "3", "5"]
    assert found[-1] == "set()"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_ledger_of_three_million_rows_answers_at_once() -> None:
    """`make ledger-proof` asks one of 100 million."""
    command = [sys.executable, "-m", "tests.helpers.ledgers", "--rows=3000000", "--limit-s=1"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_record_has_one_row_however_often_the_run_is_killed() -> None:
    run_proof("crash_proof", "--seeds=20", "--variant=ledger")
