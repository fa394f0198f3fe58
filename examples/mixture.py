"""A small model and a stream in which one sample in four is of the target's kind: counting, among three other kinds."""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, LENGTH = 64, 16
CANDIDATES = 16  # of each step


def make_model() -> LlamaForCausalLM:
    """A Llama of two layers with random parameters."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
        )
    )


def make_samples(count: int, seed: int, kinds: tuple[str, ...] = ("count", "noise", "back", "repeat")) -> Tensor:
    """Token ids, (count, LENGTH): each sample counts up from anywhere, counts down, repeats one token, or is noise."""
    generator = torch.Generator().manual_seed(seed)
    steps = {"count": 1, "back": -3, "repeat": 0}
    starts = torch.randint(VOCABULARY, (count,), generator=generator).tolist()
    rows = []
    for start, kind in zip(starts, torch.randint(len(kinds), (count,), generator=generator).tolist(), strict=True):
        if kinds[kind] == "noise":
            rows.append(torch.randint(VOCABULARY, (LENGTH,), generator=generator))
        else:
            rows.append((start + steps[kinds[kind]] * torch.arange(LENGTH)) % VOCABULARY)
    return torch.stack(rows)


def as_batch(ids_NT: Tensor) -> dict[str, Tensor]:
    """What a data collator makes of samples that carry loss on every token."""
    return {"input_ids": ids_NT, "labels": ids_NT.clone()}


def candidates(step: int) -> dict[str, Tensor]:
    """The stream's next samples."""
    return as_batch(make_samples(CANDIDATES, seed=step))


def target_batches() -> list[dict[str, Tensor]]:
    """What the model should get better at; never trained on."""
    return [as_batch(make_samples(16, seed=10_001, kinds=("count",)))]


def test_loss(model: nn.Module) -> float:
    """Loss on samples of the target's kind that are neither target nor trained on (nats per token)."""
    with torch.no_grad():
        return float(model(**as_batch(make_samples(64, seed=10_002, kinds=("count",)))).loss)
