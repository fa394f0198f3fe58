"""The process of one method: it makes the method ready, then does one repetition for each line on standard input.

    python -m benchmarks.step_cost.worker '{"method": "plain_all", "workload": {...}, "device": "cpu", "threads": 2}'

Answers are JSON, one object a line: `{"versions": ...}` once it is ready, a repetition's details after that, or
`{"error": ...}`. Between the lines it waits without using the processor. With `answers` in the job it writes what the
method finds for the check samples to that file and ends. Started by `processes.start`; peers run it in an environment
of their own.
"""

import json
import os
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any, TextIO

from benchmarks.step_cost.methods import DISTRIBUTIONS, make_method
from benchmarks.step_cost.workloads import Workload
from stream_trainer.monitoring.allocator import keep_freed_memory

KERNEL_STATUS = Path("/proc/self/status")


def main(job: dict[str, Any]) -> None:
    """Serve a job until standard input ends."""
    replies = _own_stdout()
    try:
        _serve(job, replies)
    except Exception as error:
        _reply(
            replies, {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
        )
        raise


def _serve(job: dict[str, Any], replies: TextIO) -> None:
    import torch
    from safetensors.torch import save_file

    keep_freed_memory()  # as the service does; every method gains by it
    torch.set_num_threads(job["threads"])
    method = make_method(job["method"], Workload(**job["workload"]), job["device"])
    versions = _versions(job["method"])
    if job.get("answers"):
        found = method.answers()
        if found is not None:
            save_file({name: values.detach().cpu().contiguous() for name, values in found.items()}, job["answers"])
        _reply(replies, {"versions": versions, "answered": found is not None})
        return
    method.warm_up()
    _reply(replies, {"versions": versions})
    for _ in sys.stdin:
        details = method.repetition()
        _reply(replies, {**details, "peak_bytes": _peak_bytes(job["device"])})


def _own_stdout() -> TextIO:
    """Standard output for the replies alone: whatever a library prints goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


def _reply(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def _versions(method: str) -> dict[str, str]:
    names = ["torch", "transformers", "stream-trainer"]
    if method in DISTRIBUTIONS:
        names.append(DISTRIBUTIONS[method])
    return {"python": python_version(), **{name: version(name) for name in names}}


def _peak_bytes(device: str) -> int:
    """Peak memory of this process, or of what it allocated on the GPU.

    The kernel's VmHWM where there is one: `ru_maxrss` of a new process starts with what its parent held.
    """
    import torch

    if device != "cpu":
        peak: int = torch.cuda.max_memory_allocated(device)
        torch.cuda.empty_cache()  # the others that wait on this GPU need the room
        return peak
    if KERNEL_STATUS.exists():
        line = next(line for line in KERNEL_STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
