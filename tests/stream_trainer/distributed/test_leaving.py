"""A process of several ends without Python being taken apart, which may abort it."""

import os
import subprocess
import sys
from pathlib import Path

ABORTED = 99
ABORTING = f"import atexit, os\natexit.register(os._exit, {ABORTED})\n"  # as torch's threads may
LEAVING = "print('said', end='')\nfrom stream_trainer.distributed.leaving import leave\nleave(3)\n"


def ended(arguments: list[str], size: int, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([variables.pop("PYTHONPATH", ""), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "WORLD_SIZE": str(size)}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def test_one_of_several_ends_at_once_and_has_said_all() -> None:
    found = ended(["-c", ABORTING + LEAVING], 2)
    assert (found.returncode, found.stdout) == (3, "said")


def test_one_alone_ends_as_ever() -> None:
    assert ended(["-c", ABORTING + LEAVING], 1).returncode == ABORTED


def test_so_does_the_command(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(ABORTING)
    arguments = ["-m", "stream_trainer", "run", f"--config={tmp_path / 'missing.yaml'}"]
    found = ended(arguments, 2, PYTHONPATH=str(tmp_path))
    assert found.returncode == 2
    assert "missing.yaml" in found.stderr
