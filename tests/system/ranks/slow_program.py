"""`sharded_program` with a slow rank: `python -m ... FOLDER PASS_S FIRST_S`. What it waited is in `waited.json`."""

import json
import os
import sys
from pathlib import Path

import pytest

from stream_trainer.distributed.leaving import leave
from tests.system.ranks import sharded_program
from tests.system.ranks.slow import SLOW, slow_down


def main(folder: Path, pass_s: float, first_s: float) -> None:
    with pytest.MonkeyPatch.context() as patches:
        waits = slow_down(pass_s, first_s, patches)
        sharded_program.main(folder, 0, 0)
    if int(os.environ["RANK"]) == SLOW:
        (folder / "waited.json").write_text(json.dumps(waits))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
    leave(0)
