"""`stream-trainer ledger show` on a ledger of two trainers, three checkpoints and two versions."""

import json
import os
import sys
from pathlib import Path

import pytest

from stream_trainer.checkpoints.ownership import claim
from stream_trainer.cli import main
from stream_trainer.ledger.files import put, table_of
from stream_trainer.records import Decided, Outcome, Partition
from tests.helpers.ledgers import output_beside_pandas

LOG = Partition("orders", 3)
TIME = 1_700_000_000.25


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Steps 1 and 2 by the first trainer, step 3 by the next; a version of each, and one that was passed over."""
    checkpoints, models = tmp_path / "checkpoints", tmp_path / "models"
    checkpoints.mkdir()
    first = [
        Decided(LOG, 10, Outcome.TRAINED, TIME, "a", 1, 0.5),
        Decided(LOG, 11, Outcome.NOT_SELECTED, TIME, "b", 2, 0.0),
        Decided(LOG, 12, Outcome.DEAD_LETTERED, TIME, reason="bad_json"),
    ]
    owner = claim(checkpoints)
    put(checkpoints, owner, 0, 3, table_of(first, owner.epoch, 2, 3))
    owner = claim(checkpoints)
    second = [Decided(LOG, 13, Outcome.TRAINED, TIME, "a", 3, 1.0)]
    put(checkpoints, owner, 3, 4, table_of(second, owner.epoch, 3, 4))
    for name, next_offset in (("step-00000002.e1", 13), ("step-00000003.e2", 14)):
        (checkpoints / name).mkdir()
        cursor = {"partitions": {"orders:3": {"next": next_offset, "decided": []}}}
        (checkpoints / name / "trainer.json").write_text(json.dumps({"cursor": cursor}))
    for number, checkpoint in enumerate(["step-00000002.e1", "step-00000005.e1", "step-00000003.e2"], start=1):
        version = models / f"v{number:06d}-step-{int(checkpoint[5:13])}"
        version.mkdir(parents=True)
        (version / "version.json").write_text(json.dumps({"checkpoint": checkpoint}))
    return tmp_path


def ask(place: Path, *arguments: str) -> int:
    return main(["ledger", "show", f"--dir={place / 'checkpoints'}", f"--models={place / 'models'}", *arguments])


def test_a_record_is_shown_with_the_models_that_saw_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(place, "--partition=3", "--offset=10") == 0
    head, row, *more = capsys.readouterr().out.splitlines()
    assert head.split() == ["topic", "partition", "offset", "id", "outcome", "step", "coefficient", "reason", "time"]
    assert row.split() == ["orders", "3", "10", "a", "trained", "1", "0.5", "-", "2023-11-14T22:13:20.250000+00:00"]
    assert more == [
        "decided before checkpoint step-00000002.e1",
        "checkpoints trained on it: step-00000002.e1, step-00000003.e2",
        "versions trained on it: v000001-step-2, v000002-step-5, v000003-step-3",
    ]


def test_an_id_is_shown_as_json_each_time_that_it_came(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(place, "--id=a", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["offset"], row["coefficient"]) for row in found["rows"]] == [(10, 0.5), (13, 1.0)]
    assert found["rows"][1]["versions"] == ["v000003-step-3"]  # not the one that the next trainer did not go on from
    assert found["rows"][1]["checkpoints"] == ["step-00000003.e2"]
    assert found["more"] is False


@pytest.mark.parametrize(("offset", "outcome"), [(11, "not_selected"), (12, "dead_lettered")])
def test_what_was_not_trained_on_is_in_no_model(
    offset: int, outcome: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(place, "--partition=3", f"--offset={offset}", "--topic=orders", "--json") == 0
    row = json.loads(capsys.readouterr().out)["rows"][0]
    assert (row["outcome"], row["checkpoints"], row["versions"]) == (outcome, [], [])
    assert row["reason"] == ("bad_json" if offset == 12 else None)


def test_a_step_is_shown_up_to_the_limit(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(place, "--step=2") == 0
    assert "not_selected" in capsys.readouterr().out
    assert ask(place, "--id=a", "--limit=1") == 0
    assert "there are more; --limit is 1" in capsys.readouterr().out


def test_a_version_is_shown_with_what_it_was_trained_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(place, "--version=v000003-step-3") == 0
    text, _, row = capsys.readouterr().out.splitlines()
    assert text == "v000003-step-3, of checkpoint step-00000003.e2, was trained on 2 records"
    assert row.split() == ["orders", "3", "2", "10", "13"]
    assert ask(place, "--version=v000002-step-5", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["redone"] is True
    assert found["trained"] == [{"topic": "orders", "partition": 3, "records": 1, "first": 10, "last": 10}]


@pytest.mark.parametrize(
    ("offset", "why"),
    [(9, "lost or never there"), (14, "step-00000003.e2 reads on at offset 14")],
)
def test_what_is_not_there_says_why(offset: int, why: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(place, "--partition=3", f"--offset={offset}") == 1
    found = capsys.readouterr().out
    assert found.startswith(f"not in the ledger: partition 3, offset {offset}; ")
    assert why in found
    assert len(found.splitlines()) == 1
    assert ask(place, "--id=nobody", "--json") == 1
    assert json.loads(capsys.readouterr().out) == {"rows": [], "more": False}


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "one question"),
        (["--id=a", "--step=1"], "one question"),
        (["--offset=1"], "give both"),
        (["--partition=1", "--id=a"], "give both"),
        (["--version=v9"], "is not in"),
        (["--id=a", "--config=x.yaml"], "leave out --config"),
        (["--limit=0", "--id=a"], "at least 1"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], why: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(place, *arguments) == 2
    found = capsys.readouterr().err
    assert why in found
    assert len(found.splitlines()) == 1


def test_a_place_without_a_ledger_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ledger", "show", f"--dir={tmp_path}", "--id=a"]) == 2
    assert capsys.readouterr().err.startswith(f"error: checkpoint.dir={tmp_path} holds no ledger; ")


def test_a_damaged_segment_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (place / "checkpoints" / "ledger").glob("*.parquet"):
        path.write_bytes(b"PAR1 and no more")
    assert ask(place, "--partition=3", "--offset=10") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_no_question_waits_for_pandas(place: Path) -> None:
    """What pyarrow does by itself shows that its import would be told."""
    command = ["ledger", "show", f"--dir={place / 'checkpoints'}", f"--models={place / 'models'}"]
    code = (
        "import pyarrow; from stream_trainer.cli import main\n"
        "for question in ('--id=a', '--step=2', '--version=v000003-step-3'):\n"
        f"    assert main([*{command}, question]) == 0\n"
        "print('asked'); pyarrow.scalar(1)"
    )
    answers, beyond = output_beside_pandas(place, code).split("asked\n")
    assert "pandas" not in answers
    assert "pandas" in beyond


def test_a_reader_that_leaves_is_no_failure(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `head` does. Python would say so once more at its end, if what is left were written."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert ask(place, "--partition=3", "--offset=10") == 0
        assert ask(place, "--partition=3", "--offset=99") == 1
