"""Watchers are told what a run does, each in its turn."""

import threading
from pathlib import Path

from stream_trainer.service import serve
from stream_trainer.settings.schema import Settings
from stream_trainer.training.watchers import Watcher, Watchers
from tests.helpers.service import configuration, good, jsonl, write_lines


def test_a_watcher_that_wants_nothing_is_left_out_and_all_are_told_in_their_order() -> None:
    told: list[str] = []
    watchers = Watchers(
        [
            Watcher(on_event=lambda *_: told.append("first")),
            Watcher(),
            Watcher(on_event=lambda *_: told.append("third")),
        ]
    )
    watchers.event(3, "rollback", "the model died")
    watchers.checkpoint(3, Path("step-3"))
    watchers.evaluation(3, {"target": 1.0}, 0.1)
    assert told == ["first", "third"]


def test_a_run_tells_of_its_steps_evaluations_and_checkpoints(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", [good(number) for number in range(40)])
    told: list[tuple[str, int]] = []
    watcher = Watcher(
        on_step=lambda step, *_: told.append(("step", step)),
        on_evaluation=lambda step, *_: told.append(("evaluation", step)),
        on_checkpoint=lambda step, path: told.append((path.name.partition("-")[0], step)),
    )
    config = configuration(tmp_path, jsonl(tmp_path / "in.jsonl"), training={"max_steps": 2})
    serve(Settings(**config), threading.Event(), watcher)
    assert told == [("evaluation", 0), ("step", 0), ("step", 1), ("step", 2), ("step", 2), ("evaluation", 2)]
