"""A model and batches that are small enough for the examples in this documentation."""

import torch
from torch import Tensor, nn


def tiny_model(seed: int = 0) -> nn.Module:
    """A Llama with random parameters: 2 layers of width 16, 32 tokens. Needs transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def tiny_batch(num_samples: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Random samples of 8 tokens, as a data collator makes them."""
    ids_NT = torch.randint(32, (num_samples, 8), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids_NT, "labels": ids_NT.clone(), "attention_mask": torch.ones_like(ids_NT)}
