"""The process of one rank: it joins the others, then does what each line on standard input says.

    RANK=0 WORLD_SIZE=2 python -m benchmarks.scale_out.worker '{"workload": {...}, "device": "cpu", "meeting": FILE}'

Lines and answers are JSON, one object a line. Between the lines it waits without using the processor.
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
from gradient_selectors.world.base import Alone, World
from safetensors.torch import save_file

from benchmarks.gpu.profiling import synchronise
from benchmarks.gpu.shapes import Shape
from benchmarks.scale_out.noted import Noted
from benchmarks.scale_out.plan import REFRESH_STEPS, Workload
from benchmarks.scale_out.steps import Rank

PATIENCE = timedelta(minutes=5)
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"


def main(job: dict[str, Any]) -> None:
    """Serve until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")  # for the replies alone: whatever a library prints goes to standard error
    os.dup2(2, 1)
    torch.set_num_threads(job["threads"])
    device = _device(job["device"])
    world = Noted(_join(job["meeting"], device), lambda: synchronise(device))
    shape = Shape(**job["workload"].pop("shape"))
    rank = Rank(Workload(shape, **job["workload"]), device, world)
    _reply(replies, {"weights": rank.num_weights})
    for line in sys.stdin:
        order = json.loads(line)
        _reply(replies, WORK[order.pop("do")](rank, world, **order))


def _device(kind: str) -> torch.device:
    if kind == "cpu":
        return torch.device(kind)
    device = torch.device(kind, int(os.environ["RANK"]))
    torch.cuda.set_device(device)
    return device


def _join(meeting: str, device: torch.device) -> World:
    """The ranks, which meet at a file that is not there yet."""
    rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    if size == 1:
        return Alone()
    import torch.distributed as dist
    from gradient_selectors.world.ranks import Ranks

    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{meeting}", rank=rank, world_size=size, timeout=PATIENCE)
    return Ranks(PATIENCE)


def _answer(rank: Rank, world: Noted, method: str, pool: int, path: str) -> dict[str, Any]:
    found, weights = rank.answers(method, pool)
    if world.rank == 0:
        save_file({name: values.contiguous() for name, values in found.items()}, path)
    return {"weights": weights}


def _repeat(rank: Rank, world: Noted, method: str, pool: int, *, phases: bool) -> dict[str, Any]:
    """Steps from one refresh of the target to the next: seconds and bytes of one, the mean, and the peak of memory.

    With `phases` the device is waited for at every call, and the seconds of each phase are known.
    """
    rank.begin(method, pool)
    _forget_peak(rank.device)
    world.times, world.seconds = phases, {}
    before = Counter(world.sent)
    found: dict[str, float] = {}
    synchronise(rank.device)
    started = time.perf_counter()
    for _ in range(REFRESH_STEPS):
        for name, value in rank.step(pool).items():
            found[name] = found.get(name, 0.0) + value
    synchronise(rank.device)
    seconds = (time.perf_counter() - started) / REFRESH_STEPS
    sent = {kind: (count - before[kind]) / REFRESH_STEPS for kind, count in world.sent.items()}
    answer = {"seconds": seconds, "sent": sent, "peak_bytes": _peak(rank.device)}
    if phases:
        answer["phases"] = {name: value / REFRESH_STEPS for name, value in found.items()}
        answer["exchange"] = {name: value / REFRESH_STEPS for name, value in world.seconds.items()}
    return answer


WORK: dict[str, Callable[..., dict[str, Any]]] = {"answer": _answer, "repeat": _repeat}


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        CLEAR.write_text(RESET_PEAK)


def _peak(device: torch.device) -> int | None:
    """Most bytes since `_forget_peak`: those that torch allocated on a GPU, or the whole process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not CLEAR.exists():
        return None
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _reply(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
