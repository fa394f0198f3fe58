"""What a process that is killed leaves behind, and what the next one makes of it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from stream_trainer.checkpoints.ownership import Owner, claim, note_in
from stream_trainer.training.faults.attempts import Attempts
from tests.helpers.fakes import sample

POOL = [sample(offset, num_tokens=offset) for offset in range(1, 5)]


def begun(folder: Path, checkpoint: int | None = 40) -> Attempts:
    attempts = Attempts(claim(folder))
    attempts.begin(checkpoint)
    return attempts


def note(folder: Path) -> dict[str, Any]:
    """Of the one claim there is."""
    (path,) = folder.iterdir()
    found: dict[str, Any] = json.loads(note_in(path.read_bytes()))
    return found


def test_a_step_that_was_left_is_no_death(tmp_path: Path) -> None:
    first = begun(tmp_path)
    assert not first.enter(41)
    first.leave(41)
    assert not begun(tmp_path).enter(41)


def test_a_process_that_dies_twice_of_a_sample_gets_past_it(tmp_path: Path) -> None:
    begun(tmp_path).enter(43)
    for _ in range(2):
        again = begun(tmp_path)
        assert not again.enter(42)
        again.leave(42)
        assert again.enter(43)
        assert not any(again.has_killed(each) for each in POOL)
        again.trying(43, POOL[:1])
        again.trying(43, POOL[1:2])
    last = begun(tmp_path)
    assert last.enter(43)
    assert [each.offset for each in POOL if last.has_killed(each)] == [2]
    last.leave(43)
    last.saved(44)
    assert not last.has_killed(POOL[1])


def test_a_pool_that_kills_as_a_whole_loses_its_longest(tmp_path: Path) -> None:
    begun(tmp_path).enter(43)
    for _ in range(2):
        begun(tmp_path).trying(43, POOL)
    assert [each.offset for each in POOL if begun(tmp_path).has_killed(each)] == [4]


def test_one_death_of_each_of_two_samples_blames_neither(tmp_path: Path) -> None:
    begun(tmp_path).enter(43)
    for each in POOL[:2]:
        begun(tmp_path).trying(43, [each])
    assert not any(begun(tmp_path).has_killed(each) for each in POOL)


@pytest.mark.parametrize("checkpoint", [None, 39, 43, 44])
def test_deaths_before_another_checkpoint_do_not_count(checkpoint: int | None, tmp_path: Path) -> None:
    begun(tmp_path).enter(43)
    assert not begun(tmp_path, checkpoint).enter(43)


def test_a_death_behind_a_checkpoint_that_was_still_being_written_counts(tmp_path: Path) -> None:
    begun(tmp_path).enter(43)
    again = begun(tmp_path, 42)
    assert again.suspects
    assert again.enter(43)
    again.leave(43)
    assert not again.suspects


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"step": 43}', b"\xff"])
def test_a_note_that_cannot_be_read_says_nothing(content: bytes, tmp_path: Path) -> None:
    owner = claim(tmp_path)
    owner.path.write_bytes(owner.words + content)
    attempts = begun(tmp_path)
    assert not attempts.enter(43)
    assert note(tmp_path)["step"] == 43


def take_notes(owner: Owner) -> None:
    """Whatever a process notes in its life."""
    attempts = Attempts(owner)
    attempts.begin(40)
    attempts.enter(41)
    attempts.trying(41, POOL)
    attempts.leave(41)
    attempts.saved(50)


def test_a_process_that_was_taken_over_writes_nothing_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped before each of its calls in turn, and is woken once another has taken over, but noted nothing."""
    calls = ("open", "pread", "pwrite", "fsync")
    originals = {name: getattr(os, name) for name in calls}
    for moment in range(10):
        folder, left = tmp_path / str(moment), list[bytes]()
        folder.mkdir()
        begun(folder).enter(41)
        old, made = claim(folder), list[str]()

        def call(name: str, *arguments: Any, moment: int = moment, folder: Path = folder) -> Any:
            made.append(name)  # noqa: B023
            if len(made) == moment + 1:  # noqa: B023
                left.append(claim(folder).path.read_bytes())  # noqa: B023
            return originals[name](*arguments)

        with monkeypatch.context() as patch:
            for name in calls:
                patch.setattr(os, name, lambda *arguments, name=name: call(name, *arguments))
            take_notes(old)
        if not left:
            break
        assert [path.name for path in folder.iterdir()] == ["epoch-3"]
        assert [path.read_bytes() for path in folder.iterdir()] == left
    assert moment > 5


def test_what_the_last_process_noted_waits_in_the_claim_of_the_next(tmp_path: Path) -> None:
    """Which may be taken over itself, or die, before it begins."""
    begun(tmp_path).enter(41)
    left = note(tmp_path)
    for _ in range(2):
        claim(tmp_path)
        assert note(tmp_path) == left
    claim(tmp_path).path.rename(tmp_path / "epoch-3")
    (tmp_path / "epoch-4").touch()  # killed as it had come
    assert begun(tmp_path).enter(41)


def test_a_process_that_dies_before_a_step_leaves_what_it_found(tmp_path: Path) -> None:
    begun(tmp_path).enter(41)
    begun(tmp_path)
    assert begun(tmp_path).enter(41)


def test_a_note_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    attempts = Attempts(Owner(tmp_path / "file", 1))
    attempts.begin(40)
    for step in range(3):
        assert not attempts.enter(step)
        attempts.leave(step)
    assert len([line for line in caplog.messages if "cannot be written" in line]) == 1
