"""What the tests of `benchmarks.learning` share: a tier in miniature, records, results."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.learning.methods import FTW
from benchmarks.learning.plan import BROAD
from benchmarks.learning.run import Bench
from benchmarks.learning.streams import CLEAN, TARGET, Data, Stream

TINY = replace(
    BROAD,
    model={
        "config": {
            "model_type": "llama",
            "vocab_size": 259,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 48,
        },
        "tokenizer": "bytes",
    },
    warm_up_steps=3,
    max_tokens=48,
    prompt_chars=16,
    steps=4,
    every=2,
    target=4,
    test=4,
    retention=4,
    seeds=1,
    streams={"mixture": ("uniform", f"{FTW}+cluster_ucb")},
)


def record(name: str, number: int) -> dict[str, str]:
    domain = name.partition("/")[2]
    words = " ".join(f"{domain}{(number * step) % 41}" for step in range(1, 12))
    return {"id": f"{name.replace('/', '-')}-{number}", "domain": domain, "prompt": f"ask {words}", "response": words}


def domains_of(stream: Stream) -> list[str]:
    return [stream.labels[r["id"]].domain for r in stream.records]


def kinds_of(stream: Stream) -> list[str]:
    return [stream.labels[r["id"]].kind for r in stream.records]


def fake_bench(data: Data) -> Bench:
    return Bench(data, Path("unused"), 1, threading.Event(), lambda _: None)


def points(losses: Sequence[float], samples: int, scored: int, seconds: float) -> list[dict[str, Any]]:
    return [
        {
            "step": i,
            "trained": samples * i,
            "scored": scored * i,
            "seconds": seconds * i,
            "cpu_seconds": 2 * seconds * i,
            "test": loss,
            "target": loss / 2,
            "retention": 2.0 + i,
            "domains": {TARGET: i, "tools": i},
            "kinds": {CLEAN: i},
        }
        for i, loss in enumerate(losses)
    ]


def curve(method: str, seed: int, losses: Sequence[float], scored: int = 4, seconds: float = 1.0) -> dict[str, Any]:
    where = {"tier": "real", "stream": "mixture", "target_share": 25, "method": method, "seed": seed}
    return where | {"points": points(losses, 4, scored, seconds)}
