"""Weights of a model directory that are held in fewer bits.

transformers would load them without a word. What was quantised would be trained as if it were exact, or not at all.
"""

from typing import Any

from transformers import FineGrainedFP8Config, Mxfp4Config

from stream_trainer.errors import SettingsError
from stream_trainer.settings.schema import ModelSettings

# Formats that are read back as plain weights, by which the model can be trained like any other.
DEQUANTISED: dict[str, Any] = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
BITS = "bitsandbytes"
ANOTHER = "name the model it was made from"


def format_of(config: Any) -> str | None:
    """In which format a model's weights are quantised; None for plain ones."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    fields = stored if isinstance(stored, dict) else stored.to_dict()
    if fields.get("load_in_4bit") or fields.get("load_in_8bit"):
        return BITS
    return str(getattr(fields.get("quant_method"), "value", fields.get("quant_method")))


def check_format(settings: ModelSettings, config: Any) -> None:
    """Refuse weights that are quantised in a way that nothing here can train. Raises SettingsError."""
    found, name = format_of(config), f"model.name={settings.name}"
    in_4_bits = settings.lora is not None and settings.lora.base == "nf4"
    if found in DEQUANTISED and in_4_bits:
        raise SettingsError(f"{name} is quantised already ({found}), not to nf4; set model.lora.base to bfloat16")
    if found is None or found in DEQUANTISED:
        return
    if found != BITS:
        raise SettingsError(f"{name} is quantised already ({found}), which cannot be trained; {ANOTHER}")
    stored = config.quantization_config
    if not (stored if isinstance(stored, dict) else stored.to_dict()).get("load_in_4bit"):
        raise SettingsError(f"{name} is quantised already to 8 bits ({BITS}), which cannot be trained; {ANOTHER}")
    if not in_4_bits:
        raise SettingsError(
            f"{name} is quantised already to 4 bits ({BITS}); set model.lora.base to nf4 to train adapters on it, or "
            f"{ANOTHER}"
        )


def is_packed(config: Any) -> bool:
    """Whether the weights lie in the 4 bits that they are to be held in."""
    return format_of(config) == BITS


def becomes_plain(config: Any) -> bool:
    """Whether the weights are quantised in a file and plain once they are loaded."""
    return format_of(config) in DEQUANTISED


def reading(config: Any) -> dict[str, Any]:
    """Arguments by which transformers reads quantised weights as plain ones."""
    return {"quantization_config": DEQUANTISED[str(format_of(config))](dequantize=True)}


def forget_format(config: Any) -> None:
    """Leave no word of quantisation in the configuration of a model whose weights are plain now."""
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config


def untie(config: Any, model: Any) -> None:
    """Say of a head with weights of its own that it is none of the embedding's, which transformers finds out by itself.

    Servers go by the configuration, and would leave the head that was trained aside.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is embedding.weight:
        return
    for part in (config, config.get_text_config()):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
