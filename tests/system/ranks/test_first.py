"""What rank 0 does for all: it publishes, uploads and takes orders, which every rank obeys between the same steps."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from gradient_selectors.views.interaction import Interaction
from gradient_selectors.world.base import World

from stream_trainer.distributed.steering import SharedSteering
from stream_trainer.errors import SettingsError
from stream_trainer.publishing import backup
from stream_trainer.training.control import watched
from stream_trainer.training.trainer import Trainer
from tests.gradient_selectors.world.threads import without_locks
from tests.helpers.service import Step, checkpoints, goods, jsonl, trainer_json, write_lines
from tests.system.operations.test_control import NEW_TARGET
from tests.system.ranks.runs import serve_on_ranks
from tests.system.ranks.test_ranks import settings

RECORDS = 64


@pytest.fixture(autouse=True)
def _no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(Interaction, monkeypatch)


def config_of(folder: Path, **sections: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    write_lines(folder / "samples.jsonl", goods(RECORDS))
    return settings(folder / "run", jsonl(folder / "samples.jsonl"), **sections)


def test_rank_0_publishes_and_uploads_the_last_checkpoint(tmp_path: Path) -> None:
    store = f"memory://ranks-{tmp_path.name}"
    saved = {"every_steps": 3, "upload": store}
    config = config_of(tmp_path, publish={"dir": str(tmp_path / "published")}, checkpoint=saved)
    config["evaluation"]["every_steps"] = 1
    summaries, _ = serve_on_ranks(config, 2)
    last = checkpoints(config)[-1]
    about = json.loads((tmp_path / "published" / "current" / "version.json").read_text())
    assert (about["step"], about["checkpoint"]) == (summaries[0].step, last.name)
    assert about["records"] == summaries[0].counts
    uploaded = fsspec.filesystem("memory").find(store.removeprefix("memory:/"))
    assert any(last.name in path for path in uploaded)


def test_what_rank_0_cannot_open_ends_all_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(setting: str, url: str) -> None:
        raise SettingsError(f"{setting}={url} needs a package")

    monkeypatch.setattr(backup, "open_store", refuse)
    config = config_of(tmp_path, checkpoint={"upload": "s3://nowhere"})
    with pytest.raises(SettingsError, match=r"checkpoint\.upload=s3://nowhere needs a package"):
        serve_on_ranks(config, 2)


def ordering(after: dict[int, Callable[[Trainer], None]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something on rank 0 after some of its steps."""
    make = Trainer._step

    def step(self: Trainer, *arguments: Any, **options: Any) -> Any:
        made = make(self, *arguments, **options)
        world: World = self.engine.world
        if world.rank == 0 and self.step in after:
            after[self.step](self)
        return made

    monkeypatch.setattr(Trainer, "_step", step)


def orders_of(trainer: Trainer) -> Any:
    assert isinstance(trainer.steering, SharedSteering)
    return trainer.steering._orders


def test_orders_that_rank_0_takes_are_obeyed_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = serve_on_ranks(config_of(tmp_path / "plain"), 2)
    given: list[Any] = []

    def give(trainer: Trainer) -> None:
        given.extend(orders_of(trainer).give(action) for action in ("pause", "checkpoint", "resume", "reload-target"))

    ordering({2: give}, monkeypatch)
    config = config_of(tmp_path / "ordered", control={"enabled": True, "port": 0, "token": "0123456789abcdef"})
    summaries, steps = serve_on_ranks(config, 2)
    assert [order.outcome.value for order in given] == ["done"] * 4
    assert "target already" in given[3].detail
    assert [saved.name[:13] for saved in checkpoints(config)][1:2] == [f"step-{int(given[1].detail.split()[-1]):08d}"]
    assert [summary.counts for summary in summaries] == [summary.counts for summary in plain]
    assert told(steps[0]) == told(steps[1])


def told(steps: list[Step]) -> list[tuple[Any, ...]]:
    return [(step.ids, step.coefficients) for step in steps]


def test_a_pause_holds_all_until_they_are_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rest, rested = Trainer.rest, []

    def stopping(self: Trainer) -> None:
        rested.append(self.engine.world.rank)
        if self.engine.world.rank == 1 and rested.count(1) == 2:
            self.steering._control.told_to_stop = lambda: True  # type: ignore[attr-defined]
        rest(self)

    monkeypatch.setattr(Trainer, "rest", stopping)
    ordering({2: lambda trainer: orders_of(trainer).give("pause")}, monkeypatch)
    config = config_of(tmp_path)
    summaries, _ = serve_on_ranks(config, 2)
    assert summaries[0].step == summaries[1].step == trainer_json(config)["step"] < RECORDS // 8
    assert rested.count(0) == rested.count(1)


def test_a_new_target_takes_over_on_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "LOOK_S", 0.0)
    config = config_of(tmp_path, target={"watch": True})
    target = Path(config["target"]["path"])

    def replace(_: Trainer) -> None:
        write_lines(tmp_path / "new.jsonl", NEW_TARGET)
        shutil.move(tmp_path / "new.jsonl", target)

    ordering({2: replace}, monkeypatch)
    summaries, steps = serve_on_ranks(config, 2)
    assert summaries[0].losses == summaries[1].losses
    assert told(steps[0]) == told(steps[1])
    assert len(checkpoints(config)) > 2  # one of the change itself
    _, (alone,) = serve_on_ranks(config, 1)  # the file is that of the checkpoint
    assert alone == []
