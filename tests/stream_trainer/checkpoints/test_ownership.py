"""Who may write: claims, the lock of one machine, and a loser that is woken between any two of its steps."""

import errno
import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from stream_trainer.checkpoints import checkpoint, ownership
from stream_trainer.checkpoints.checkpoint import load_latest, save_checkpoint
from stream_trainer.checkpoints.directory import checkpoints_in
from stream_trainer.checkpoints.ownership import Owner, claim, locked, note_in
from stream_trainer.errors import CheckpointError, FencedError
from tests.stream_trainer.checkpoints.test_checkpoint import state_at

ME = rf"pid {os.getpid()} on {re.escape(socket.gethostname())} since 20\d\d-\S+\+00:00"
CHANGES = ("mkdir", "rename", "fsync", "unlink", "rmdir", "open")


@pytest.fixture
def save(monkeypatch: pytest.MonkeyPatch) -> Callable[[Owner, int], Path]:
    """What the trainer does at a checkpoint, with two small files for a model and its optimizer."""

    def write(directory: Path, *_: Any) -> None:
        (directory / "model").mkdir()
        for name in ("model/weights", "trainer.json"):
            (directory / name).write_text(name)

    monkeypatch.setattr(checkpoint, "_write_files", write)
    monkeypatch.setattr(checkpoint, "require_finite", lambda *_: None)

    def checkpoint_as(owner: Owner, step: int) -> Path:
        owner.confirm()
        nothing = cast(Any, None)
        state = state_at(step)
        return save_checkpoint(owner.directory, nothing, nothing, state, 2, owner.epoch, owner.confirm).path

    return checkpoint_as


def contents(directory: Path) -> dict[str, bytes]:
    """All but what is only on its way to become a checkpoint, or to be deleted."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    named = {path.relative_to(directory).as_posix(): path for path in files}
    return {name: path.read_bytes() for name, path in named.items() if not name.startswith(".tmp-")}


def test_every_claim_is_the_next_and_only_the_last_is_good(tmp_path: Path) -> None:
    first, second = claim(tmp_path), claim(tmp_path)
    assert (first.epoch, second.epoch) == (1, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-2"]
    second.confirm()
    with pytest.raises(FencedError, match=rf"^checkpoint.dir={tmp_path} was taken over by {ME}, so this .*; run one"):
        first.confirm()
    assert FencedError.exit_code == 6


def test_a_claim_that_another_forestalls_takes_the_one_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its look and its claim; once to the same epoch, once beyond it and with the older claims gone."""
    create, others = ownership._create, [["epoch-1"], ["epoch-3"]]

    def late(owner: Owner) -> None:
        for name in others.pop(0) if others else []:
            (tmp_path / name).touch()
        create(owner)

    monkeypatch.setattr(ownership, "_create", late)
    assert claim(tmp_path).epoch == 4


def test_an_epoch_is_above_that_of_every_checkpoint(tmp_path: Path) -> None:
    """Whoever copies checkpoints may leave the claims behind."""
    (tmp_path / "step-00000042.e7").mkdir()
    assert claim(tmp_path).epoch == 8


def test_a_directory_that_was_emptied_is_still_ours_until_somebody_comes(
    tmp_path: Path, save: Callable[[Owner, int], Path]
) -> None:
    directory = tmp_path / "run"
    owner = Owner(directory, 3)
    directory.mkdir()
    owner.confirm()
    shutil.rmtree(directory)
    assert save(owner, 1).name == "step-00000001.e3"
    shutil.rmtree(directory)
    directory.mkdir()
    assert claim(directory).epoch == 1
    with pytest.raises(FencedError):
        save(owner, 2)
    assert not list(directory.glob("step-*"))


def test_a_directory_that_was_emptied_and_claimed_anew_is_no_longer_ours(
    tmp_path: Path, save: Callable[[Owner, int], Path]
) -> None:
    """Epochs begin at 1 again, so the number alone tells nothing."""
    first = claim(tmp_path)
    first.path.unlink()
    assert claim(tmp_path).epoch == first.epoch
    with pytest.raises(FencedError, match=rf"was taken over by {ME}, so"):
        save(first, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-1"]


def test_a_trainer_that_is_woken_in_its_claim_changes_nothing_that_a_successor_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[[Owner, int], Path]
) -> None:
    """It may still come to be the owner itself, with an epoch above, if its claim was not made yet."""
    moments = 0
    while True:
        directory = tmp_path / str(moments)
        directory.mkdir()
        before = claim(directory)
        before.path.write_bytes(before.words + b"note")
        save(before, 1)
        (directory / ".tmp-e1-aa-step-00000002").mkdir()
        made: list[tuple[Owner, dict[str, bytes]]] = []
        with monkeypatch.context() as patch:
            take_over_before_change(patch, moments, directory, made)
            woken = claim(directory)
        if not made:
            break
        ((new, left),) = made
        found = contents(directory)
        owner = max(new, woken, key=lambda each: each.epoch)
        owner.confirm()
        assert note_in(found.pop(owner.path.name)) == b"note"
        for name in [*left, *found]:
            assert name.startswith("epoch-") or found[name] == left[name], moments
        save(owner, 3)
        moments += 1
    assert moments > 8


def test_a_claim_without_words_is_a_claim(tmp_path: Path) -> None:
    """Its trainer was cut off between creating and writing it."""
    owner = claim(tmp_path)
    (tmp_path / "epoch-2").touch()
    with pytest.raises(FencedError, match="taken over by another trainer, so"):
        owner.confirm()


def test_a_directory_that_cannot_be_read_is_trouble_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = claim(tmp_path)

    def refuse(_: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be written .*Input/output error.*; check the disk"):
        owner.confirm()


def test_the_lock_names_who_has_it_and_goes_with_its_process(tmp_path: Path) -> None:
    message = rf"^checkpoint.dir={tmp_path}/run is in use by {ME}; stop that"
    with locked(tmp_path / "run"), pytest.raises(FencedError, match=message):
        locked(tmp_path / "run").__enter__()
    with locked(tmp_path / "run"):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["owner.lock"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_there_are_no_locks_epochs_alone_decide(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path), locked(tmp_path):
        first = claim(tmp_path)
        claim(tmp_path)
    with pytest.raises(FencedError):
        first.confirm()


def test_a_lock_that_a_mount_keeps_for_another_machine_is_no_obstacle(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with locked(tmp_path):
        holder = json.loads((tmp_path / "owner.lock").read_text())
        (tmp_path / "owner.lock").write_text(json.dumps(holder | {"machine": "another", "host": "elsewhere"}))
        with locked(tmp_path):
            assert "is taken over from pid" in caplog.text
            assert "on elsewhere" in caplog.text
        (tmp_path / "owner.lock").write_text("")  # caught before its holder wrote its name
        with pytest.raises(FencedError, match="in use by another trainer"):
            locked(tmp_path).__enter__()


def test_a_trainer_that_is_woken_after_a_takeover_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[[Owner, int], Path]
) -> None:
    """It is stopped before each change to the disk in turn, and another takes over meanwhile."""
    moments = 0
    while True:
        directory = tmp_path / str(moments)
        directory.mkdir()
        old = claim(directory)
        for step in (1, 2):
            save(old, step)
        made: list[tuple[Owner, dict[str, bytes]]] = []
        with monkeypatch.context() as patch:
            take_over_before_change(patch, moments, directory, made)
            try:
                save(old, 3)
            except FencedError:
                pass
            else:
                assert not made
        if not made:
            break
        ((new, left),) = made
        assert contents(directory) == left, moments
        found = load_latest(directory)
        assert found is not None
        assert found.step in (2, 3)
        save(new, found.step + 1)
        assert not list(directory.glob(".tmp-*"))
        assert [found.epoch for found in checkpoints_in(directory)] == [2, 1]
        moments += 1
    assert moments > 15


def take_over_before_change(
    patch: pytest.MonkeyPatch, moment: int, directory: Path, made: list[tuple[Owner, dict[str, bytes]]]
) -> None:
    """Before the change to the disk of this number; what is there just after is kept."""
    originals, count, busy = {name: getattr(os, name) for name in CHANGES}, 0, False

    def change(name: str, *arguments: Any, **options: Any) -> Any:
        nonlocal count, busy
        if not busy:
            if count == moment:
                busy = True
                new = claim(directory)
                made.append((new, contents(directory)))
                busy = False
            count += 1
        return originals[name](*arguments, **options)

    for name in CHANGES:
        patch.setattr(os, name, lambda *a, _name=name, **o: change(_name, *a, **o))


def test_what_a_loser_left_is_taken_away_and_what_a_successor_writes_is_not(
    tmp_path: Path, save: Callable[[Owner, int], Path]
) -> None:
    for name in (".tmp-step-00000001", ".tmp-e1-aa-step-00000001", ".tmp-e2-bb-trash", ".tmp-e9-cc-step-00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    save(Owner(tmp_path, 2), 5)
    assert {path.name for path in tmp_path.iterdir()} == {".tmp-e9-cc-step-00000001", "epoch-2", "step-00000005.e2"}
