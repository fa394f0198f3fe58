"""What is measured: models, pools and targets of stated shapes, and the service's settings for them.

Weights are random. Tokens follow a Zipf law, as words do: the gradients of different samples then have something in
common, and the filter keeps as many samples as it may. Every token carries loss, and every sample is as long as any
other, so that there is nothing to gain from padding or prompts. Nothing here imports torch: the process that times
others stays small.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil
from typing import Any

from stream_trainer.records import Partition, Sample
from stream_trainer.settings.schema import Settings

REFRESH_STEPS = 8  # steps between refreshes of the target's gradient
NUM_POOLS = 8
DRAWN = 3 / 8  # of the candidates, by a bandit: 6 of 16
TARGET_SEED = 1000
MANDELBROT = 2.7  # the usual offset of ranks for words
PARTITION = Partition("benchmark", 0)


@dataclass(frozen=True)
class Workload:
    """One shape of the work.

    Attributes:
        layers, hidden, intermediate, heads, kv_heads, vocabulary: of a Llama with random weights.
        pool: candidates N of a step.
        batch_size: samples k that enter an update.
        keep_ratio: at most this many times `batch_size` enter K.
        tokens: T of every sample.
        dtype: float32, or bfloat16 for passes under autocast; the service's own rule turns it into float32 for all
            methods where a processor has no instructions for it.
        lora_rank: rank of the adapters, or None to train everything.
        target: samples of the target that a refresh takes, as many as half of the pool.
    """

    name: str
    layers: int = 12
    hidden: int = 576
    intermediate: int = 1536
    heads: int = 9
    kv_heads: int = 3
    vocabulary: int = 8192
    pool: int = 16
    batch_size: int = 4
    keep_ratio: float = 2.0
    tokens: int = 128
    dtype: str = "float32"
    lora_rank: int | None = None
    target: int = 8


_ALL = (
    Workload("W1"),
    Workload("W2", layers=30, dtype="bfloat16"),
    Workload("W3", lora_rank=8),
    Workload("W4", pool=4, batch_size=1, tokens=1024, target=2),  # k = N / 4, as in the others
    Workload("W5", vocabulary=49152),
    Workload("tiny", 2, 32, 64, 4, 2, vocabulary=320, pool=8, batch_size=2, tokens=12, target=4),
    Workload("tiny_lora", 2, 32, 64, 4, 2, vocabulary=320, pool=8, batch_size=2, tokens=12, target=4, lora_rank=2),
)
WORKLOADS = {workload.name: workload for workload in _ALL}
DEFAULT_WORKLOADS = ("W1", "W2", "W3", "W4", "W5")


def settings_of(workload: Workload, device: str, **selection: Any) -> Settings:
    """The service's own settings for a workload; `selection` are further settings of that section.

    Adam's second moment is the preconditioner from the second step on, as in a service that has run for a while.
    """
    model: dict[str, Any] = {
        "config": {
            "model_type": "llama",
            "vocab_size": workload.vocabulary,
            "hidden_size": workload.hidden,
            "intermediate_size": workload.intermediate,
            "num_hidden_layers": workload.layers,
            "num_attention_heads": workload.heads,
            "num_key_value_heads": workload.kv_heads,
            "max_position_embeddings": max(64, workload.tokens),
        },
        "tokenizer": "bytes",
        "dtype": workload.dtype,
        "device": device,
    }
    if workload.lora_rank is not None:
        model["lora"] = {"rank": workload.lora_rank}
    shape: dict[str, Any] = {
        "profile": "thorough",
        "pool_size": workload.pool,
        "batch_size": workload.batch_size,
        "filter_then_weight": {"keep_ratio": workload.keep_ratio},
    }
    if selection.get("draw") == "cluster_ucb":  # all candidates come in and leave, but only some get a gradient
        shape["pool_size"] = ceil(DRAWN * workload.pool)
        shape |= {"waiting": workload.pool, "intake": workload.pool}
    # The path is required and never opened: the samples are made here.
    return Settings.model_validate(
        {
            "source": {"kind": "jsonl", "jsonl": {"path": "-"}},
            "model": model,
            "target": {
                "path": "made-here.jsonl",
                "refresh_steps": REFRESH_STEPS,
                "refresh_samples": workload.target,
            },
            "selection": {"preconditioner_warmup_steps": 1, "when_none_helps": "uniform", **shape, **selection},
        }
    )


def pools(workload: Workload) -> list[list[Sample]]:
    """The pools of `NUM_POOLS` steps, the same in every process."""
    return [_samples(workload, workload.pool, seed) for seed in range(NUM_POOLS)]


def target_samples(workload: Workload) -> list[Sample]:
    """The target of a workload."""
    return _samples(workload, workload.target, TARGET_SEED)


def _samples(workload: Workload, count: int, seed: int) -> list[Sample]:
    generator = random.Random(seed)
    tokens: Sequence[int] = range(workload.vocabulary)
    shares = list(accumulate(1 / (rank + MANDELBROT) for rank in tokens))
    drawn = [tuple(generator.choices(tokens, cum_weights=shares, k=workload.tokens)) for _ in range(count)]
    return [Sample(ids, ids, PARTITION, offset=i, size=len(ids)) for i, ids in enumerate(drawn)]
