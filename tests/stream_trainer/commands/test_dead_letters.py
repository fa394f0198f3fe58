"""The command that shows dead letters: counts and examples, and values that can be published again."""

from pathlib import Path

import pytest

from stream_trainer.cli import main
from stream_trainer.ingest.letter import DeadLetter
from stream_trainer.ingest.letter_file import FileDeadLetters
from tests.helpers.fakes import records_of

VALUES = [b"{'a': 1}", b'{\n "text": "\xc3\xa9"}', b"no\nJSON", None, b"\xff\x00"]
REASONS = ["bad_json", "missing_field", "bad_json", "missing_field", "bad_utf8"]


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """Five dead letters, the first of them twice, as after a crash."""
    path = tmp_path / "dead-letters.jsonl"
    file = FileDeadLetters(path)
    records = records_of(VALUES)
    for record, reason in [*zip(records, REASONS, strict=True), (records[0], REASONS[0])]:
        file.send(DeadLetter(record, reason, f"detail of {record.offset}"))
    file.close()
    return path


def test_reasons_are_counted_with_an_example_each(letters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dead-letters", str(letters)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "       2  bad_json, first log:0 offset 0: detail of 0",
        "       2  missing_field, first log:0 offset 1: detail of 1",
        "       1  bad_utf8, first log:0 offset 4: detail of 4",
        "       5  in all",
    ]
    assert main(["dead-letters", str(letters), "--reason=bad_utf8"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "       1  in all"


def test_values_come_as_they_were_one_a_line(letters: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["dead-letters", str(letters), "--values"]) == 0
    out, err = capfdbinary.readouterr()
    assert out == b"{'a': 1}\n" + '{"text": "é"}\n'.encode() + b"\xff\x00\n"
    assert err == b"left out: 1 with line breaks that are no JSON, 1 without a value\n"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["none.jsonl"], "none.jsonl cannot be read (No such file or directory); name a file of dead letters"),
        (["other.jsonl"], "other.jsonl line 1 is no dead letter (KeyError); remove that line"),
        (
            ["dead-letters.jsonl", "--reason=x"],
            "--reason x is in no dead letter of dead-letters.jsonl; it has bad_json, ",
        ),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    problem: str,
    letters: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(letters.parent)
    Path("other.jsonl").write_text("{}\n")
    assert main(["dead-letters", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {problem}")
