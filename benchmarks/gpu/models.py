"""Models of a shape with random weights, and samples of random tokens.

Tokens follow a Zipf law, as words do: the gradients of different samples then have something in common. Every token
carries loss, and every sample is as long as any other.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.gpu.shapes import Case

SEED = 0
MANDELBROT = 2.7  # the usual offset of ranks for words


class UnmeasuredError(Exception):
    """Something that cannot be measured here, with the reason in one line."""


def make_model(case: Case, device: torch.device) -> nn.Module:
    """The model on its device, ready to train. Raises UnmeasuredError if it needs a package that is missing."""
    shape = case.shape
    if shape.lora_rank is not None and find_spec("peft") is None:
        raise UnmeasuredError("LoRA needs the package peft, which is not installed; pip install peft")
    torch.manual_seed(SEED)  # transformers draws weights from torch's own generators
    with device:
        dtype = torch.float32 if shape.lora_rank is None else torch.bfloat16
        model: Any = AutoModelForCausalLM.from_config(_config(case), dtype=dtype)
    if shape.lora_rank is not None:
        _add_adapters(model, shape.lora_rank)
    if case.checkpointing:
        # The name changed within version 5 of transformers; the first argument means the same under both.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model.train()  # type: ignore[no-any-return]


def _config(case: Case) -> LlamaConfig:
    shape = case.shape
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=case.tokens,
        tie_word_embeddings=shape.tied,
    )


def _add_adapters(model: nn.Module, rank: int) -> None:
    """Adapters on all linear layers, in float32; everything else stops requiring gradients."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
    inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def pools(case: Case, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Pools of random samples without end: token ids, (size, T) int64 on the CPU, where a data loader makes them."""
    shares_V = 1 / (torch.arange(case.shape.vocabulary) + MANDELBROT)
    while True:
        ids = torch.multinomial(shares_V, size * case.tokens, replacement=True, generator=generator)
        yield ids.view(size, case.tokens)
