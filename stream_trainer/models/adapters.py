"""LoRA's adapters, and the frozen model below them, which may be held in fewer bits than the passes need.

Adapters are float32 always: a step of the optimizer is often smaller than what bfloat16 can tell apart.
"""

from typing import Any

import torch
import transformers
from transformers import BitsAndBytesConfig

from stream_trainer.errors import SettingsError
from stream_trainer.models.refusals import loading
from stream_trainer.settings.schema import LoraSettings, ModelSettings

ADAPTER = "default"  # peft's name of the one adapter we use
NAMES_OF_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


def base_dtype(settings: LoraSettings | None, autocast: torch.dtype | None) -> torch.dtype:
    """Dtype of what is neither trained by adapters nor quantised: float32 for a model that is trained itself."""
    keeps_float32 = settings is None or settings.base == "float32"
    return torch.float32 if keeps_float32 else autocast or torch.float32


def quantisation(settings: LoraSettings | None, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments by which transformers quantises a model as it loads it; none unless `settings` ask for that.

    `dtype`: of the products with the quantised weights. The settings are QLoRA's (arXiv 2305.14314).
    Raises SettingsError, with the remedy, where bitsandbytes is missing.
    """
    if settings is None or settings.base != "nf4":
        return {}
    with loading("model.lora.base=nf4", "set model.lora.base to bfloat16", "quantised"):
        import accelerate  # noqa: F401
        import bitsandbytes  # noqa: F401
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": config, "device_map": {"": device}}


def add_adapters(model: Any, settings: ModelSettings) -> Any:
    """Put adapters into `model` in place, as `settings.lora` has them. Nothing else requires gradients any more."""
    lora = settings.lora
    assert lora is not None
    setting = f"model.lora.target_modules={lora.target_modules}"
    with loading("model.lora", "correct model.lora", "lora"):
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            base_model_name_or_path=settings.name,
            revision=settings.revision,
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=0.0,
            target_modules=_targets(model, lora),
            fan_in_fan_out=any(type(module) is transformers.pytorch_utils.Conv1D for module in model.modules()),
        )
    with loading(setting, "name modules the model has, or set it to all-linear", "lora"):
        adapted = inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    wrapped = next((n for n, module in adapted.named_modules() if type(module).__name__ == "ParamWrapper"), None)
    if wrapped is not None:
        raise SettingsError(f"{setting} adapts experts ({wrapped}); leave them out, or set it to all-linear")
    embedding, head = adapted.get_input_embeddings(), adapted.get_output_embeddings()
    if embedding.weight is head.weight and any(hasattr(module, "lora_A") for module in (embedding, head)):
        raise SettingsError(f"{setting} adapts the embedding, which is tied to the head; leave both out")
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # peft makes them in the dtype of the base
    return adapted


def _targets(model: Any, lora: LoraSettings) -> str | list[str]:
    """What peft is to adapt. Of a mixture of experts: linear layers outside of what chooses and computes experts.

    There peft takes some names, of layers that are no experts too, for those that experts had in earlier versions.
    """
    if lora.target_modules != "all-linear":
        return list(lora.target_modules)
    blocks = [name.rpartition(".")[0] for name, module in model.named_modules() if is_experts(module)]
    if not blocks:
        return "all-linear"
    linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    head = model.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, linear) and module is not head and not any(name.startswith(f"{b}.") for b in blocks)
    }
    return sorted(names - NAMES_OF_EXPERTS)


def is_experts(module: torch.nn.Module) -> bool:
    """Whether a module holds the weights of several experts in one tensor."""
    return any(parameter.ndim == 3 for parameter in module.parameters(recurse=False)) and hasattr(module, "num_experts")
