"""Reads the trainer's state from a checkpoint of format 1, which versions before the release of 0.1.0 wrote.

There, tensors of all parts lay in `selector.safetensors` as `<part>.<name>`, generators in `random.safetensors`, and
counters in `extra` of `trainer.json`.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

SELECTOR, RANDOM, TRAINER = "selector.safetensors", "random.safetensors", "trainer.json"


def read_version_1(path: Path) -> dict[str, Any]:
    """The fields of a `TrainerState`, as this version has them."""
    trainer = json.loads((path / TRAINER).read_text())
    extra, tensors, random = trainer["extra"], read_tensors(path / SELECTOR), read_tensors(path / RANDOM)
    return {
        "step": trainer["step"],
        "cursor": trainer["cursor"],
        "source_identity": trainer["source_identity"],
        "version": str(extra.get("version", "before 0.1.0")),
        "parts": {
            "engine": {
                "target": _target(extra, tensors),
                "selector": {"generator": random["step"], "selector": {}},  # of the fallback, where one is on
                "scoring": {"generator": random["sketch"], "projections": _part(tensors, "sketch")},
                "route": {"generator": random["route"]},
                "mask": _mask(extra, tensors),
            },
            "sampler": {"uniform": random["step"], **_bandit(tensors)},
        },
    }


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, copied: those of safetensors are mapped from the file, which will be deleted in time."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _target(extra: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    refreshes = extra.get("target_refreshes", 1)
    return {"gradient": _part(tensors, "target"), "age": extra["target_age"], "refreshes": refreshes}


def _mask(extra: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    if not extra.get("mask"):
        return {}
    return {"average": _part(_part(tensors, "mask"), "average"), **extra["mask"]}


def _bandit(tensors: dict[str, Tensor]) -> dict[str, Any]:
    bandit = _part(tensors, "draw")
    return {"bandit": bandit} if bandit else {}


def _part(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    prefix = f"{part}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
