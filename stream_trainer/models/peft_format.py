"""The adapters of a checkpoint in PEFT's own format, which `PeftModel` and servers load onto the base model."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.numpy

from stream_trainer.models.adapters import ADAPTER

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_ADAPTERS_NAME = re.compile(rf"(\.lora_\w+)\.{ADAPTER}\b")


def config_text(model: Any) -> str:
    """`adapter_config.json` of a live model that has adapters."""
    config = {**model.peft_config[ADAPTER].to_dict(), "inference_mode": True, "task_type": "CAUSAL_LM"}
    # PEFT holds some lists as sets, whose order changes from process to process.
    return json.dumps(config, indent=2, sort_keys=True, default=sorted) + "\n"


def write_adapter(directory: Path, config: str, weights: Mapping[str, Any]) -> None:
    """Write both files. `weights`: those of the adapters as numpy's arrays, by parameter name. Raises OSError."""
    (directory / CONFIG).write_text(config)
    named = {peft_name(name): tensor for name, tensor in weights.items()}
    safetensors.numpy.save_file(named, directory / WEIGHTS, metadata={"format": "pt"})


def peft_name(name: str) -> str:
    """PEFT leaves out the adapter's name: `q_proj.lora_A.default.weight` is `q_proj.lora_A.weight`."""
    return "base_model.model." + _ADAPTERS_NAME.sub(r"\1", name)
