"""Each file of the newest checkpoint damaged in each way: the one before is used, and the log says what was wrong."""

import itertools
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gradient_selectors.world.deal import spans_of

from stream_trainer.checkpoints.checkpoint import begin_checkpoint, load_latest, restore, save_checkpoint
from stream_trainer.checkpoints.manifest import Sealed
from stream_trainer.checkpoints.rows import InRows, write_index, write_own
from stream_trainer.errors import CheckpointError
from tests.stream_trainer.checkpoints.test_checkpoint import (
    LORA,
    Trained,
    assert_equal_tensors,
    fresh,
    latest_step,
    state_at,
    train,
)


def flip(path: Path) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_a_link(path: Path) -> None:
    """To something of the same size and with other contents."""
    (path.parents[2] / "elsewhere").write_bytes(bytes(path.stat().st_size))
    path.unlink()
    path.symlink_to(path.parents[2] / "elsewhere")


OF_A_FILE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "lengthened": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "flipped": flip,
    "removed": Path.unlink,
    "a directory": make_directory,
    "a link": replace_by_a_link,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the checkpoints of steps 1 and 2."""
    directory = tmp_path_factory.mktemp("run")
    made = fresh(lora=LORA)
    train(*made, 1, torch.Generator())
    for step in (1, 2):
        save_checkpoint(directory, *made, state_at(step), keep=2, epoch=step)
    return directory


def save_in_rows(directory: Path, made: Trained, step: int) -> None:
    """As two ranks do together."""
    temporary = begin_checkpoint(directory, step, step)
    files = dict[str, Sealed]()
    for rank in range(2):
        state = {
            key: values[slice(*spans_of(2, len(values))[rank])] if values.dim() else values
            for key, values in made.optimizer.state_dict().items()
        }
        files |= write_own(temporary, "optimizer", state, rank, 2)
    write_index(temporary, made.optimizer.parameters, 2)
    save_checkpoint(directory, *made, state_at(step), keep=2, epoch=step, rows=InRows(temporary, files))


def test_damage_to_any_file_of_a_rank_falls_back_to_the_checkpoint_before(tmp_path: Path) -> None:
    made = fresh(lora=LORA)
    train(*made, 1, torch.Generator())
    for step in (1, 2):
        save_in_rows(tmp_path, made, step)
    newest = newest_of(tmp_path)
    files = sorted(newest.glob("optimizer*"))
    assert [path.name for path in files] == [
        "optimizer-00001-of-00002.safetensors",
        "optimizer-00002-of-00002.safetensors",
        "optimizer.index.json",
    ]
    again = fresh(lora=LORA)
    found = load_latest(tmp_path)
    assert found is not None
    assert restore(found, *again).step == 2
    assert_equal_tensors(again.optimizer.state_dict(), made.optimizer.state_dict())
    for path, damage in itertools.product(files, OF_A_FILE):
        backup = path.read_bytes()
        OF_A_FILE[damage](path)
        assert latest_step(tmp_path) == 1, (path, damage)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        path.write_bytes(backup)
    assert latest_step(tmp_path) == 2


def test_a_file_of_a_rank_that_is_missing_makes_no_checkpoint(tmp_path: Path) -> None:
    made = fresh(lora=LORA)
    temporary = begin_checkpoint(tmp_path, 1, 1)
    files = write_own(temporary, "optimizer", {}, 0, 2)
    missing = {name.replace("00001", "00002", 1): sealed for name, sealed in files.items()}
    with pytest.raises(CheckpointError, match="put it on a file system that they share"):
        save_checkpoint(tmp_path, *made, state_at(1), keep=2, epoch=1, rows=InRows(temporary, {**files, **missing}))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "run"))


def newest_of(directory: Path) -> Path:
    found = load_latest(directory)
    assert found is not None
    return found.path


@pytest.mark.parametrize("damage", OF_A_FILE)
def test_damage_to_any_file_falls_back_to_the_checkpoint_before(
    damage: str, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest = newest_of(copied)
    files = [path for path in newest.rglob("*") if path.is_file()]
    names = {"manifest.json", "trainer.json", "adapter.safetensors", "optimizer.safetensors", "state.safetensors"}
    assert names | {"model.safetensors", "config.json"} <= {path.name for path in files}
    backup = newest.with_name("backup")
    for path in files:
        shutil.copytree(newest, backup)
        OF_A_FILE[damage](path)
        caplog.clear()
        assert latest_step(copied) == 1, path
        (record,) = [record for record in caplog.records if record.name == "stream_trainer.checkpoints.checkpoint"]
        assert record.levelno == logging.ERROR
        assert str(newest) in record.getMessage()
        assert path.name in record.getMessage()
        shutil.rmtree(newest)
        backup.rename(newest)
    assert latest_step(copied) == 2


@pytest.mark.parametrize("where", ["pytorch_model.bin", "model/model.safetensors.index.json", "more/file"])
def test_a_file_that_is_not_of_the_checkpoint(where: str, copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It could be loaded in the place of another."""
    foreign = newest_of(copied) / where
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("{}")
    assert latest_step(copied) == 1
    assert f"{where} is not of its files" in caplog.text


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("by", ["a file", "nothing", "an empty directory", "a link to nowhere"])
def test_a_directory_replaced(by: str, whole: bool, copied: Path) -> None:
    newest = newest_of(copied)
    directory = newest if whole else newest / "model"
    shutil.rmtree(directory)
    if by == "a file":
        directory.write_bytes(b"")
    elif by == "an empty directory":
        directory.mkdir()
    elif by == "a link to nowhere":
        directory.symlink_to("nowhere")
    assert latest_step(copied) == 1
