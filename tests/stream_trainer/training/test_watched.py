"""A watched file counts as changed once, when it has stayed the same for two looks."""

import os
from pathlib import Path

import pytest

from stream_trainer.checkpoints.fingerprint import digest_of_file
from stream_trainer.training.control import watched
from stream_trainer.training.control.watched import WatchedFile


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(watched, "LOOK_S", 0.0)
    path = tmp_path / "target.jsonl"
    path.write_text("one")
    return path


def looks(found: WatchedFile, times: int = 2) -> list[bool]:
    return [found.changed for _ in range(times)]


def test_only_another_content_counts_and_it_must_stay(file: Path) -> None:
    in_use = digest_of_file(file)
    found = WatchedFile(file, lambda: in_use)
    assert looks(found, 3) == [False, False, False]
    os.utime(file, (1, 1))
    assert looks(found, 3) == [False, False, False], "touched, and the same"
    file.write_text("two")
    assert looks(found) == [False, True]
    file.write_text("half of thr")
    assert found.changed, "until it is settled"


def test_a_content_is_tried_once(file: Path) -> None:
    found = WatchedFile(file, lambda: "another")
    assert looks(found) == [False, True]
    found.settle()
    assert looks(found, 4) == [False] * 4
    file.write_text("again")
    assert looks(found) == [False, True]


def test_a_file_that_grows_is_waited_for_and_one_that_is_gone_changes_nothing(file: Path) -> None:
    found = WatchedFile(file, lambda: "another")
    for number in range(3):
        file.write_text("x" * number)
        assert not found.changed
    file.unlink()
    assert looks(found, 3) == [False] * 3


def test_looks_are_seconds_apart(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "LOOK_S", 1e6)
    found = WatchedFile(file, lambda: "another")
    assert looks(found, 5) == [False] * 5


def test_after_contents_that_were_refused_those_in_use_are_tried_too(file: Path) -> None:
    in_use = digest_of_file(file)
    found = WatchedFile(file, lambda: in_use)
    file.write_text("garbage")
    assert looks(found) == [False, True]
    found.settle()
    found.refused = True
    assert looks(found, 3) == [False] * 3, "tried once"
    file.write_text("one")
    assert looks(found) == [False, True]
