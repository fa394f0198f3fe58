"""Ranks as processes, as torchrun would start them."""

import os
import subprocess
import sys

from stream_trainer.demo.broker import free_port


def environments(size: int) -> list[dict[str, str]]:
    """Of each rank: where they meet, and how it finds what this process can import."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    paths["PYTHONFAULTHANDLER"] = "1"  # a crash outside of Python says where
    return [{**os.environ, **place, **paths, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def run_to_end(program: str, arguments: list[str], size: int, patience_s: float) -> None:
    """Run a module on so many ranks. All must end well, and none stays."""
    command = [sys.executable, "-m", program, *arguments]
    processes = [subprocess.Popen(command, env=environment) for environment in environments(size)]
    try:
        codes = [process.wait(patience_s) for process in processes]
        assert codes == [0] * size, f"exit codes by rank: {codes}"
    finally:
        for process in processes:
            process.kill()
            process.wait()
