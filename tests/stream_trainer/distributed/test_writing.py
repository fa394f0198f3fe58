"""The ranks begin a checkpoint together; whatever one of them fails with all raise, and nothing is left."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from gradient_selectors.world.base import World
from torch import Tensor, nn

from stream_trainer.checkpoints.ownership import claim
from stream_trainer.checkpoints.rows import InRows, write_own
from stream_trainer.distributed import writing
from stream_trainer.distributed.parts import SharedOwner
from stream_trainer.errors import CheckpointError, FencedError, NotFiniteError, StreamTrainerError
from tests.gradient_selectors.world.threads import on_ranks

ROWS = 5


@dataclass
class Part:
    """Of an optimizer, and of a model: what a rank has."""

    state: dict[str, Tensor]
    parameters: dict[str, nn.Parameter] = field(default_factory=lambda: {"a": nn.Parameter(torch.zeros(ROWS, 2))})
    model: nn.Module = field(default_factory=lambda: nn.Linear(1, 1))

    def state_dict(self) -> dict[str, Tensor]:
        return self.state


def begin(world: World, directory: Path, state: dict[str, Tensor]) -> InRows:
    owner, part = SharedOwner.claim(world, directory), cast(Any, Part(state))
    begun = writing.begin_rows(world, owner, 7, part, part)
    return writing.all_written(world, owner, begun, lambda: writing.write_share(begun, state, {}, world))


def own(world: World) -> dict[str, Tensor]:
    return {"a.exp_avg": torch.full((3 - world.rank, 2), float(world.rank))}


def temporaries(directory: Path) -> list[Path]:
    return list(directory.glob(".tmp-*"))


def test_all_ranks_know_what_all_have_written(tmp_path: Path) -> None:
    first, second = on_ranks(2, lambda world: begin(world, tmp_path, own(world)))
    assert first == second
    assert [first.directory] == temporaries(tmp_path)
    assert {path.name for path in first.directory.iterdir()} == {*first.files, "optimizer.index.json"}
    for name, sealed in first.files.items():
        assert sealed["size"] == (first.directory / name).stat().st_size
    index = json.loads((first.directory / "optimizer.index.json").read_text())
    assert index["files"] == [f"optimizer-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert set(first.files) == {*index["files"], *(name.replace("optimizer", "state") for name in index["files"])}
    assert index["parameters"] == {"a": {"shape": [ROWS, 2], "begins": [0, 3]}}


def failures(directory: Path, state_of: Any = own) -> list[str]:
    def work(world: World) -> str:
        try:
            begin(world, directory, state_of(world))
        except StreamTrainerError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    return on_ranks(2, work)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_disk_that_refuses_one_rank(failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(directory: Path, of: str, state: Any, rank: int, size: int) -> Any:
        if rank == failing:
            raise CheckpointError("checkpoint.dir: no space left")
        return write_own(directory, of, state, rank, size)

    monkeypatch.setattr(writing, "write_own", refused)
    assert failures(tmp_path) == ["CheckpointError: checkpoint.dir: no space left"] * 2
    assert not temporaries(tmp_path)


def test_a_moment_that_is_not_finite_on_one_rank(tmp_path: Path) -> None:
    first, second = failures(tmp_path, lambda world: {"a.exp_avg": own(world)["a.exp_avg"] / (1 - world.rank)})
    assert first == second
    assert first.startswith(f"{NotFiniteError.__name__}: checkpoint.dir: a.exp_avg is not finite")
    assert not temporaries(tmp_path)


def test_a_successor_that_takes_away_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(directory: Path, of: str, state: Any, rank: int, size: int) -> Any:
        if rank == 1:
            claim(tmp_path)
        return write_own(directory, of, state, rank, size)

    monkeypatch.setattr(writing, "write_own", late)
    first, second = failures(tmp_path)
    assert first == second
    assert first.startswith(FencedError.__name__)
