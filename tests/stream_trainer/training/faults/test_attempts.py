"""What a process that is killed leaves behind, and what the next one makes of it."""

import json
from pathlib import Path

import pytest

from stream_trainer.training.faults.attempts import NAME, Attempts
from tests.helpers.fakes import sample

POOL = [sample(offset, num_tokens=offset) for offset in range(1, 5)]


def begun(folder: Path, checkpoint: int | None = 40) -> Attempts:
    attempts = Attempts(folder)
    attempts.begin(checkpoint)
    return attempts


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


@pytest.mark.parametrize("checkpoint", [None, 39, 44])
def test_deaths_before_another_checkpoint_do_not_count(checkpoint: int | None, tmp_path: Path) -> None:
    begun(tmp_path).enter(43)
    assert not begun(tmp_path, checkpoint).enter(43)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"step": 43}', b"\xff"])
def test_a_note_that_cannot_be_read_says_nothing(content: bytes, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(content)
    attempts = begun(tmp_path)
    assert not attempts.enter(43)
    assert json.loads((tmp_path / NAME).read_bytes())["step"] == 43


def test_a_process_that_was_taken_over_writes_nothing_any_more(tmp_path: Path) -> None:
    first = begun(tmp_path)
    first.enter(41)
    second = begun(tmp_path)
    second.enter(41)
    left = (tmp_path / NAME).read_bytes()
    first.trying(41, POOL)
    first.leave(41)
    first.saved(50)
    assert (tmp_path / NAME).read_bytes() == left
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_process_that_dies_before_a_step_leaves_what_it_found(tmp_path: Path) -> None:
    begun(tmp_path).enter(41)
    begun(tmp_path)
    assert begun(tmp_path).enter(41)


def test_a_note_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    attempts = begun(tmp_path / "file")
    for step in range(3):
        assert not attempts.enter(step)
        attempts.leave(step)
    assert len([line for line in caplog.messages if "cannot be written" in line]) == 1
