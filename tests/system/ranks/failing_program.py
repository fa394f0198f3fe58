"""`sharded_program`, but rank 1 once cannot write its rows while training goes on: `python -m ... FOLDER LAST TOLD`."""

import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from stream_trainer.checkpoints.rows import write_own
from stream_trainer.distributed import writing
from stream_trainer.distributed.leaving import leave
from stream_trainer.errors import CheckpointError
from tests.system.ranks import sharded_program


def main(folder: Path, last_step: int, told: int) -> None:
    failures = list[str]()

    def failing_once(directory: Path, of: str, *arguments: Any) -> Any:
        if os.environ["RANK"] == "1" and threading.current_thread().name == "checkpoint" and not failures:
            failures.append(of)
            raise CheckpointError("checkpoint.dir is full")
        return write_own(directory, of, *arguments)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(writing, "write_own", failing_once)
        sharded_program.main(folder, last_step, told)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    leave(0)
