"""One rank of a run, as torchrun has it: `python -m ... FOLDER LAST_STEP TOLD`.

Reads `settings.yaml` there, and writes `rank<r>.json`.
"""

import json
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import yaml

from stream_trainer.distributed.group import joined, settings_of_rank
from stream_trainer.distributed.leaving import leave
from stream_trainer.errors import StreamTrainerError
from stream_trainer.records import Sample
from stream_trainer.service import serve
from stream_trainer.settings.schema import Settings
from stream_trainer.training.step import StepReport
from stream_trainer.training.watchers import Watcher
from tests.helpers.service import Step, step_of


def main(folder: Path, last_step: int, told: int) -> None:
    settings = Settings(**yaml.safe_load((folder / "settings.yaml").read_text()))
    stop, steps, failure, world_size = threading.Event(), list[Step](), "", 0
    rank = int(os.environ["RANK"])

    def on_step(number: int, pool: Sequence[Sample], report: StepReport) -> None:
        steps.append(step_of(number, pool, report))
        if number == last_step and rank == told:
            stop.set()

    try:
        with joined(settings) as world:
            world_size = world.size
            serve(settings_of_rank(settings, world), stop, Watcher(on_step), world=world)
    except StreamTrainerError as error:
        failure = f"{type(error).__name__}: {error}"
    said = {"steps": [asdict(step) for step in steps], "failure": failure, "size": world_size}
    (folder / f"rank{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    leave(0)
