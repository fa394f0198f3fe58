"""Ranks of a real process group say what ranks of threads say, and notice one that ends."""

import json
import subprocess
import sys
from pathlib import Path

from tests.gradient_selectors.world.processes import environments

PROGRAM = """
import json, os, sys
from datetime import timedelta
import torch
import torch.distributed as dist
from gradient_selectors.world.base import LostError, RankError, first, gathered, together, union
from gradient_selectors.world.deal import Shares
from gradient_selectors.world.ranks import Ranks

dist.init_process_group("gloo", timeout=timedelta(seconds=60))
world = Ranks(timedelta(seconds=60))
rank = world.rank
given = [torch.tensor([10.0 * rank]), torch.ones(2) * rank]
found = {
    "sum": world.sum(torch.tensor([1.0 + rank, 2.0])).tolist(),
    "rows": world.rows(torch.full((1 + rank, 2), float(rank)), [1, 2]).tolist(),
    "no rows": world.rows(torch.zeros(0, 2), [0, 0]).tolist(),
    "exchange": [part.tolist() for part in world.exchange(given, [[1, 1], [2, 2]][rank])],
    "scatter": world.scatter(torch.arange(6.0).view(3, 2) + rank).tolist(),
    "gather": [value.decode() for value in world.gather(b"" if rank else b"zero")],
    "facts": world.facts([rank, 7]),
    "first": first(world, {"rank": rank}),
    "gathered": gathered(world, [rank, None]),
    "union": union(world, torch.tensor([5, rank, rank])).tolist(),
    "spread": Shares.of(world, [3, 9, 4]).spread(torch.tensor([[9.0], [3.0, 4.0]][rank])).tolist(),
}
try:
    with together(world):
        assert rank == 0, "rank 1 cannot"
except RankError as error:
    found["error"] = str(error)
found["sent"] = dict(world.sent)
if rank == 1:
    print(json.dumps(found), flush=True)
    os._exit(3)
try:
    world.facts([0])
except LostError:
    found["lost"] = True
print(json.dumps(found), flush=True)
os._exit(0)
"""


def test_two_processes_exchange_what_they_are_told_to(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, text=True)
        for environment in environments(2)
    ]
    first, second = (json.loads(process.communicate(timeout=200)[0]) for process in processes)
    assert [process.returncode for process in processes] == [0, 3]
    assert first.pop("lost")
    assert (first.pop("exchange"), second.pop("exchange")) == ([[0.0], [10.0]], [[0.0, 0.0], [1.0, 1.0]])
    assert (first.pop("scatter"), second.pop("scatter")) == ([[1.0, 3.0], [5.0, 7.0]], [[9.0, 11.0]])
    assert first.pop("sent") != {}
    assert second.pop("sent")["sum"] == 8
    assert first == second
    assert first == {
        "sum": [3.0, 4.0],
        "rows": [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]],
        "no rows": [],
        "gather": ["zero", ""],
        "facts": [[0, 7], [1, 7]],
        "first": {"rank": 0},
        "gathered": [[0, None], [1, None]],
        "union": [0, 1, 5],
        "spread": [3.0, 9.0, 4.0],
        "error": "rank 1 failed: AssertionError: rank 1 cannot",
    }
