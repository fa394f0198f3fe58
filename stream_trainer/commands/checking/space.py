"""Whether memory and disk will do: what is held and written, counted by the parameters of the model.

The model is made without its weights, so that all of it is counted as the service has it. What depends on the length of
samples (activations, logits) is not counted: so what is refused here could never run.
"""

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from stream_trainer.commands.checking.result import Check
from stream_trainer.monitoring.allocator import memory_limit
from stream_trainer.settings.schema import Settings

FLOAT32_BYTES = 4
INT8_BLOCK = 256  # weights that share a scale, in either moment
INT8_LEAST = 4096  # parameters of fewer weights keep float32
BASE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "nf4": 0.55}
CHOSEN = ("num_experts_per_tok", "moe_top_k", "top_k")  # how configurations call it
GIB = 2**30


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model.

    Attributes:
        base: weights without adapters.
        trained: weights of each parameter that is trained.
        factors: numbers that one token leaves in each layer's factors: inputs and gradients of outputs.
        of_experts: those of them that are kept whatever the limit is.
    """

    base: int
    trained: tuple[int, ...]
    factors: int
    of_experts: int

    @property
    def num_trained(self) -> int:
        return sum(self.trained)


def sizes_of(settings: Settings) -> Sizes | None:
    """None where only loading the model can tell. Takes seconds: torch is loaded for it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = settings.model
    try:
        if model.config is not None:
            fields = dict(model.config)
            config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        elif model.name is not None and model.gguf_file is None and Path(model.name).is_dir():
            config = AutoConfig.from_pretrained(model.name, local_files_only=True)
        else:
            return None
        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(config)
    except Exception:  # whatever is wrong with it, loading says it better
        return None
    return _sizes(settings, made)


def _sizes(settings: Settings, model: Any) -> Sizes:
    import torch

    parameters = [parameter.numel() for parameter in model.parameters()]
    head = model.get_output_embeddings()
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    factors = sum(module.in_features + module.out_features for _, module in linear if module is not head)
    lora = settings.model.lora
    if lora is None:
        of_experts = _of_experts(model)
        return Sizes(sum(parameters), tuple(parameters), factors + of_experts, of_experts)
    wanted = lora.target_modules
    adapted = [
        module
        for name, module in linear
        if (module is not head if wanted == "all-linear" else name.rpartition(".")[2] in wanted)
    ]
    adapters = [lora.rank * size for module in adapted for size in (module.in_features, module.out_features)]
    return Sizes(sum(parameters), tuple(adapters), factors, 0)


def _of_experts(model: Any) -> int:
    """Of experts that lie in one tensor, for as many as a token is sent to."""
    from stream_trainer.models.adapters import is_experts

    config = model.config.get_text_config()
    chosen = next((n for name in CHOSEN if isinstance(n := getattr(config, name, None), int)), 1)
    tensors = (parameter for module in model.modules() if is_experts(module) for parameter in module.parameters(False))
    return chosen * sum(sum(tensor.shape[1:]) for tensor in tensors if tensor.ndim == 3)


def checkpoint_bytes(settings: Settings, sizes: Sizes) -> int:
    """Of one checkpoint: exported model, adapters, moments, and what the selection keeps."""
    lora = settings.model.lora
    model = FLOAT32_BYTES * sizes.base
    if lora is not None:
        alone = lora.base != "float32"
        # Adapters twice: by our names, and as PEFT has them.
        model = 2 * FLOAT32_BYTES * sizes.num_trained + (0 if alone else model)
    return model + _moments(settings, sizes) + _gradients(settings, sizes)


def _gradients(settings: Settings, sizes: Sizes) -> int:
    """That a checkpoint holds: the target's, and the mask's mean gradient."""
    return (2 if settings.selection.mask == "dual_sft" else 1) * FLOAT32_BYTES * sizes.num_trained


def _moments(settings: Settings, sizes: Sizes) -> int:
    if settings.optimizer.moments == "int8":
        small = sum(size for size in sizes.trained if size < INT8_LEAST)
        large = sizes.num_trained - small
        return 2 * FLOAT32_BYTES * small + 2 * large + 2 * FLOAT32_BYTES * large // INT8_BLOCK
    if settings.selection.mask == "dual_sft":  # of the weights that may move: two moments, and where they are
        return int(3 * FLOAT32_BYTES * settings.selection.dual_sft.density * sizes.num_trained)
    return 2 * FLOAT32_BYTES * sizes.num_trained


def memory_bytes(settings: Settings, sizes: Sizes) -> Mapping[str, int]:
    """What a step holds for certain, by name."""
    selection, lora = settings.selection, settings.model.lora
    base = BASE_BYTES["float32" if lora is None else lora.base]
    held = {
        "weights": int(base * sizes.base) + (0 if lora is None else FLOAT32_BYTES * sizes.num_trained),
        "moments": _moments(settings, sizes),
        "gradient": FLOAT32_BYTES * sizes.num_trained,
        "target's gradient": FLOAT32_BYTES * sizes.num_trained,
    }
    if settings.checkpoint.asynchronous and not settings.model.device.startswith("cuda"):  # there it is in main memory
        trained = FLOAT32_BYTES * sizes.num_trained
        held["copy for checkpoints"] = trained + _moments(settings, sizes) + _gradients(settings, sizes)
    return held | {"factors of a pool, at most": _factors(settings, sizes)} if selection.weigh != "equal" else held


def _factors(settings: Settings, sizes: Sizes) -> int:
    of_token = FLOAT32_BYTES * settings.selection.pool_size * settings.samples.max_tokens
    full, experts = of_token * sizes.factors, of_token * sizes.of_experts
    limit = settings.memory.factors_gb
    bounded = limit is not None and settings.selection.scoring != "rank_one"
    return max(experts, min(full, int((limit or 0) * 1e9))) if bounded else full


def nearest(path: Path) -> Path:
    """`path`, or its nearest ancestor that exists."""
    return next((place for place in (path, *path.absolute().parents) if place.exists()), Path("/"))


def room(settings: Settings) -> Check:
    """Room for one more checkpoint, known at once: two moments and weights of the shape of those that are there.

    Adapters take next to nothing. `space` counts exactly, and has to make the model for it.
    """
    directory, model = settings.checkpoint.dir, settings.model
    weights = [] if model.lora or model.name is None else Path(model.name).glob("*.safetensors")
    free, needed = shutil.disk_usage(nearest(directory)).free, 3 * FLOAT32_BYTES * sum(map(_num_weights, weights))
    text = f"{free / GIB:.1f} GiB free"
    if free < needed:
        remedy = f"one checkpoint takes {needed / GIB:.1f} GiB or more; free some or name another disk"
        return Check("checkpoint room", False, f"checkpoint.dir={directory} has {text}, {remedy}")
    return Check("checkpoint room", True, text)


def _num_weights(file: Path) -> int:
    """How many a safetensors file holds, of whatever dtype; checkpoints hold them in float32."""
    try:
        with safe_open(file, "np") as tensors:
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return 0  # loading it will say what is wrong


def space(settings: Settings) -> Iterator[Check]:
    """Memory and disk against what there is."""
    sizes = sizes_of(settings)
    if sizes is None:
        return
    yield _memory(settings, memory_bytes(settings, sizes))
    yield _disk(settings, checkpoint_bytes(settings, sizes))


def _memory(settings: Settings, parts: Mapping[str, int]) -> Check:
    free = _free_memory(settings.model.device)
    told = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
    # Factors that do not fit are made again: too little room for them ends no run.
    needed = sum(size for name, size in parts.items() if not name.startswith("factors"))
    if free is not None and needed > free:
        remedy = "set model.lora, optimizer.moments=int8 or a smaller model"
        return Check("memory", False, f"model needs {_gib(needed)} ({told}), of {_gib(free)} that are free; {remedy}")
    return Check("memory", True, f"{_gib(needed)} without activations ({told})")


def _free_memory(device: str) -> int | None:
    """Bytes that this process may still take; None if that is not known."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else None
    found = [_number_in(Path("/proc/meminfo"), "MemAvailable:", 1024)]
    limit, used = int(memory_limit()), _number_in(Path("/sys/fs/cgroup/memory.current"), "", 1) or 0
    found.append(limit - used if limit else None)
    return min((size for size in found if size is not None), default=None)


def _number_in(path: Path, name: str, unit: int) -> int | None:
    try:
        line = next(line for line in path.read_text().splitlines() if line.startswith(name))
        return unit * int(line.removeprefix(name).split()[0])
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _disk(settings: Settings, size: int) -> Check:
    """Room for all checkpoints that are kept and one that is written, less those that are there."""
    directory, keep = settings.checkpoint.dir, settings.checkpoint.keep
    there = sum(entry.name.startswith("step-") for entry in os.scandir(directory)) if directory.is_dir() else 0
    needed, free = max(1, keep + 1 - there) * size, shutil.disk_usage(nearest(directory)).free
    told = f"{keep} checkpoints and one that is written, of {_gib(size)} each"
    if needed > free:
        remedy = "free some, lower checkpoint.keep or name another disk"
        return Check(
            "disk", False, f"checkpoint.dir={directory} has {_gib(free)} free; {told} need {_gib(needed)}; {remedy}"
        )
    return Check("disk", True, f"{_gib(free)} free; {told}")


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
