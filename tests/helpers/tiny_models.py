"""Models of a few thousand weights, one of each kind that matters, and what tests do with them."""

from pathlib import Path
from typing import Any

import torch

from stream_trainer.settings.schema import ModelSettings

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "attention_dropout": 0.1,
    },
    "qwen2": {
        "model_type": "qwen2",
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "gpt2": {"model_type": "gpt2", "vocab_size": 300, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
}
INPUT = torch.arange(24).reshape(2, 12)


def settings_of(kind: str, **others: Any) -> ModelSettings:
    return ModelSettings(config=CONFIGS[kind], tokenizer="bytes", **others)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=INPUT).logits
    return logits


def with_config(kind: str, **changes: Any) -> ModelSettings:
    return ModelSettings(config={**CONFIGS[kind], **changes}, tokenizer="bytes")


def shake(model: torch.nn.Module, seed: int = 3, frozen: bool = False) -> None:
    """Give every trainable weight another value, `frozen` ones too; fresh adapters would be zero maps."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad or frozen:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def overwrite(path: Path) -> None:
    """Change the contents of a file in place, which shows in every memory map of it."""
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
