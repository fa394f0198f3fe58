"""`stream-trainer`, with steps that take a second, and with faults that only its own process can do to itself.

Files in the folder that FAULTS names do them: `hang` holds the next step up while it is there, and `nan` spoils one
parameter, once.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from stream_trainer.cli import main
from stream_trainer.training.trainer import Trainer

STEP_S = 1.0


def _step_with_faults(folder: Path) -> Any:
    step = Trainer._step

    def slowed(trainer: Trainer, *arguments: Any) -> bool:
        time.sleep(STEP_S)
        if (folder / "nan").exists():
            (folder / "nan").unlink()
            with torch.no_grad():
                next(iter(trainer.engine.capture.parameters.values())).fill_(float("nan"))
        while (folder / "hang").exists():
            time.sleep(0.05)
        return step(trainer, *arguments)

    return slowed


if __name__ == "__main__":
    Trainer._step = _step_with_faults(Path(os.environ["FAULTS"]))  # type: ignore[method-assign]
    sys.exit(main())
