"""What is written and said of a run: what it ran on, ratios, and tables."""

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from platform import python_version
from typing import Any

import torch

from benchmarks.common.reporting import table
from benchmarks.gpu.methods import DTYPE
from benchmarks.gpu.shapes import CHOSEN, Case

PACKAGES = ("torch", "transformers", "peft")
PAIRS = (("select", "plain_all"), ("select", "plain_k"), ("probe", "plain_k"), ("equal", "plain_k"))
DRIVER = ("--query-gpu=driver_version", "--format=csv,noheader")

Row = Mapping[str, Any]


def origin(device: torch.device) -> dict[str, Any]:
    """What a result was measured on and with."""
    versions = {name: version(name) for name in PACKAGES if find_spec(name) is not None}
    return {
        "gpu": _gpu(device) if device.type == "cuda" else None,
        "passes": str(DTYPE).removeprefix("torch."),
        "versions": {"python": python_version(), "cuda": torch.version.cuda, **versions},
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(device)
    return {"name": found.name, "memory_bytes": found.total_memory, "driver": _driver()}


def _driver() -> str | None:
    """Version of NVIDIA's driver, which torch does not say; None where its tool is missing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    said = subprocess.run([tool, *DRIVER], capture_output=True, text=True, check=False).stdout.splitlines()
    return said[0].strip() if said else None


def describe(case: Case) -> dict[str, Any]:
    """A case with what follows from it."""
    follows = {"pool": case.pool, "chosen": CHOSEN, "checkpointing": case.checkpointing}
    return {"shape": asdict(case.shape), "tokens": case.tokens, **follows}


def summarise(runs: Sequence[Row]) -> list[dict[str, Any]]:
    """Ratios of each case: ours over plain training, below 1 is cheaper."""
    found = {(run["shape"], run["tokens"], run["method"]): run for run in runs}
    rows = []
    for shape, tokens in dict.fromkeys((run["shape"], run["tokens"]) for run in runs):
        for method, against in PAIRS:
            ours, theirs = found.get((shape, tokens, method)), found.get((shape, tokens, against))
            if ours is None or theirs is None:
                continue
            row = {"shape": shape, "tokens": tokens, "method": method, "against": against}
            rows.append(row | {"time": ours["median_s"] / theirs["median_s"], **_memory(ours, theirs)})
    return rows


def _memory(ours: Row, theirs: Row) -> dict[str, float | None]:
    """Of peaks, and of what they are over the weights and moments at rest."""
    if ours["peak_bytes"] is None or theirs["peak_bytes"] is None:
        return {"peak": None, "over_rest": None}
    over = [run["peak_bytes"] - run["rest_bytes"] for run in (ours, theirs)]
    return {"peak": ours["peak_bytes"] / theirs["peak_bytes"], "over_rest": over[0] / over[1]}


def text(result: Row) -> str:
    """What people read at the end."""
    runs = [
        (
            *(run["shape"], f"{run['tokens']}", run["method"], f"{run['median_s']:.4f}"),
            *(f"{run['tokens_per_s']:.0f}", _shown(run["peak_bytes"], 1e9)),
        )
        for run in result["runs"]
    ]
    ratios = [
        (
            *(row["shape"], f"{row['tokens']}", row["method"], row["against"]),
            *(_shown(row[name]) for name in ("time", "peak", "over_rest")),
        )
        for row in result["summary"]
    ]
    parts = [
        table(("shape", "tokens", "method", "seconds a step", "tokens/s", "peak GB"), runs),
        table(("shape", "tokens", "ours", "over", "time", "peak", "peak over rest"), ratios),
        *(
            f"{row['shape']}, {row['tokens']} tokens: {row['method'] or 'the case'} was left out: {row['reason']}"
            for row in result["missing"]
        ),
    ]
    return "\n\n".join(parts)


def _shown(value: float | None, unit: float = 1.0) -> str:
    return "-" if value is None else f"{value / unit:.2f}"
