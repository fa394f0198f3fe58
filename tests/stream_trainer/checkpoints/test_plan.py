"""What is written of each step survives what may happen to a file, and only what goes on from a checkpoint is kept."""

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stream_trainer.checkpoints.ownership import claim
from stream_trainer.checkpoints.plan import NAME, Entry, Made, PlanFile, Planned, Position, lines_of, read_plan
from stream_trainer.errors import FencedError


def entry(step: int, seconds: float = 0.1) -> Entry:
    records = (Position(0, 10 * step), Position(2, step))
    planned = Planned(step, 6, "samples", records, candidates=3, drawn=records[1:])
    return Entry(planned, Made(step, "applied", "optimal", seconds, 1.0, ((2, step, "killed"),)))


def plan_with(directory: Path, steps: range) -> PlanFile:
    plan = PlanFile(directory, claim(directory))
    assert plan.begin(0, follow=False) == {}
    for step in steps:
        for line in (entry(step).planned, entry(step).made):
            assert line is not None
            plan.append(line)
    return plan


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    plan_with(tmp_path, range(1, 5)).close()
    assert read_plan(tmp_path / NAME) == {step: entry(step) for step in range(1, 5)}
    assert (tmp_path / NAME).read_bytes() == lines_of(map(entry, range(1, 5)))
    assert len((tmp_path / NAME).read_bytes()) < 4 * 300


def test_what_is_behind_the_checkpoint_is_followed_or_cut_off(tmp_path: Path) -> None:
    plan_with(tmp_path, range(1, 9)).close()
    following = PlanFile(tmp_path, claim(tmp_path))
    assert following.begin(6, follow=True) == {7: entry(7), 8: entry(8)}
    assert sorted(read_plan(tmp_path / NAME)) == list(range(1, 9))  # a crash now loses none of it
    assert following.begin(6, follow=False) == {7: entry(7), 8: entry(8)}
    assert sorted(read_plan(tmp_path / NAME)) == list(range(1, 7))
    following.close()


def test_a_torn_last_line_is_no_line(tmp_path: Path) -> None:
    plan_with(tmp_path, range(1, 4)).close()
    content = (tmp_path / NAME).read_bytes()
    last = len(content.splitlines(keepends=True)[-1])
    for missing in range(1, last):
        (tmp_path / NAME).write_bytes(content[:-missing])
        found = read_plan(tmp_path / NAME)
        assert found[2] == entry(2)
        assert found[3] in (entry(3), replace(entry(3), made=None))  # without its newline it is whole
    plan = PlanFile(tmp_path, claim(tmp_path))
    assert plan.begin(2, follow=True)[3].made is None
    plan.append(entry(4).planned)
    plan.close()
    assert list(read_plan(tmp_path / NAME)) == [1, 2, 3, 4]


def test_a_step_that_is_made_of_the_same_again_keeps_what_followed_it(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, range(1, 7))
    plan.append(entry(4).planned)
    assert sorted(read_plan(tmp_path / NAME)) == list(range(1, 7))
    plan.append(replace(entry(4).planned, candidates=9))
    assert sorted(read_plan(tmp_path / NAME)) == list(range(1, 5))
    assert read_plan(tmp_path / NAME)[4].made is None
    plan.close()


def test_the_file_holds_no_more_than_the_checkpoints_that_are_kept(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, range(1, 9))
    for name in ("step-00000004.e1", "step-00000008.e1"):
        (tmp_path / name).mkdir()
    plan.prune()
    assert sorted(read_plan(tmp_path / NAME)) == [5, 6, 7, 8]
    plan.append(entry(9).planned)
    plan.close()
    assert sorted(read_plan(tmp_path / NAME)) == [5, 6, 7, 8, 9]
    assert not list(tmp_path.glob(".tmp-*"))


def test_one_that_was_taken_over_changes_nothing(tmp_path: Path) -> None:
    old = plan_with(tmp_path, range(1, 4))
    new = PlanFile(tmp_path, claim(tmp_path))
    new.begin(0, follow=True)
    before = (tmp_path / NAME).read_bytes()
    old.append(entry(4).planned)
    with pytest.raises(FencedError):
        old.begin(0, follow=False)
    assert (tmp_path / NAME).read_bytes() == before
    old.close()
    new.close()


def test_a_full_disk_stops_nothing_and_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan, write = plan_with(tmp_path, range(1, 4)), os.write
    full: list[Any] = [True]
    monkeypatch.setattr(os, "write", lambda file, text: write(file, text[:20] if full else text))
    with caplog.at_level(logging.WARNING):
        plan.append(entry(4).planned)
        plan.append(entry(5).planned)
    full.clear()
    plan.append(entry(6).planned)
    plan.close()
    assert len(caplog.records) == 1
    assert sorted(read_plan(tmp_path / NAME)) == [1, 2, 3, 6]
