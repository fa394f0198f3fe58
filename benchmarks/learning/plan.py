"""The runs of `benchmarks.learning`, most important first, and the names under which they are kept.

Three tiers. `real`: a pretrained model, few methods, three seeds; a run ends one evaluation after it has reached what
uniform ended with. `broad`: a Llama of 10 million parameters on bytes, warmed up by the benchmark itself, every method
and ablation, five seeds, all steps. `qwen2`: the same for a second family of models, whose biases and tied head a Llama
lacks; the service's profiles, three seeds.

How often the target is refreshed, how many records wait and come in for a bandit, the least gain of a sample, and the
service's `preconditioner_warmup_steps` were chosen on SmolLM2 by the target's loss and by the domains that were drawn,
on streams of seeds that no result has. `benchmarks/LOG.md` says how each was. No number was tuned on the test loss.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.learning.methods import FTW, METHODS, REFERENCE, selection_of
from benchmarks.learning.streams import MISLEADING


@dataclass(frozen=True, eq=False)  # compared by identity, so that runs can be keys
class Tier:
    """What the runs of a tier have in common.

    Attributes:
        model: the service's settings of that section.
        warm_up_steps: of 16 samples on all domains alike before any run; 0 takes the model as it is.
        max_tokens: T of a sample at most.
        prompt_chars: characters of a prompt that are kept, the last ones.
        steps: updates of a run.
        every: steps between evaluations; four times as many for the reference, of which only the end counts.
        target, test, retention: samples of these sets.
        refresh_steps: steps between refreshes of the target's gradient.
        refresh_samples: samples of the target that each of them takes, in turn.
        stops_early: end a run soon after it has reached the reference.
        seeds: repetitions unless told otherwise.
        shares: of the target's domain in a stream, in percent, unless told otherwise; all of them for the first stream,
            the first of them for the others.
        streams: methods by stream, unless told otherwise.
    """

    name: str
    model: dict[str, Any]
    warm_up_steps: int
    max_tokens: int
    prompt_chars: int
    learning_rate: float
    steps: int
    every: int
    target: int
    test: int
    retention: int
    refresh_steps: int
    refresh_samples: int
    stops_early: bool
    seeds: int
    shares: tuple[int, ...]
    streams: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Run:
    """One run of the service."""

    tier: Tier
    stream: str
    share: int
    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.tier.name} {self.stream} {self.share} % {self.method} seed {self.seed}"

    @property
    def case(self) -> tuple[str, str, int, int]:
        """What a run has in common with the reference it is measured against."""
        return self.tier.name, self.stream, self.share, self.seed


PROFILES = ("uniform", "thrifty", "auto", "nearest", "near_random")
CORE = ("uniform", "thrifty", "nearest", "near_random", FTW, f"{FTW}+cluster_ucb", "oracle", "everything")
REAL = Tier(
    name="real",
    model={},
    warm_up_steps=0,
    max_tokens=128,
    prompt_chars=384,
    learning_rate=2e-5,
    steps=64,
    every=8,
    target=24,
    test=48,
    retention=16,
    refresh_steps=4,
    refresh_samples=4,
    stops_early=True,
    seeds=3,
    shares=(25, 10),
    streams={
        "mixture": CORE,
        "swapped": PROFILES,
        "duplicates": PROFILES,
        "copies": ("uniform", FTW, "top_k"),
        "narrow": ("uniform", f"{FTW}+cluster_ucb", f"{FTW}+cluster_ucb+dual_sft/prior"),
    },
)
BROAD = Tier(
    name="broad",
    model={
        "config": {
            "model_type": "llama",
            "vocab_size": 259,
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "max_position_embeddings": 128,
        },
        "tokenizer": "bytes",
        "dtype": "bfloat16",
    },
    warm_up_steps=600,
    max_tokens=128,
    prompt_chars=48,
    learning_rate=1e-4,
    steps=64,
    every=8,
    target=32,
    test=64,
    retention=64,
    refresh_steps=4,
    refresh_samples=4,
    stops_early=False,
    seeds=5,
    shares=(25,),
    streams={
        "mixture": tuple(METHODS),
        "drift": ("uniform", FTW, f"{FTW}+cluster_ucb", "everything"),
        "duplicates": ("uniform", FTW, f"{FTW}+cluster_ucb", "top_k", "greedy", f"{FTW}+equal_coefficients"),
        "narrow": ("uniform", f"{FTW}+cluster_ucb", f"{FTW}+cluster_ucb+dual_sft/prior"),
    },
)
QWEN2_SHAPE = {
    "model_type": "qwen2",
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
QWEN2 = replace(
    BROAD,
    name="qwen2",
    model=BROAD.model | {"config": BROAD.model["config"] | QWEN2_SHAPE},
    warm_up_steps=300,
    seeds=3,
    streams={
        "mixture": (*PROFILES, "knn_kde", "dsir", "thorough"),
        **dict.fromkeys(("duplicates", *MISLEADING), PROFILES),
    },
)
TIERS = {tier.name: tier for tier in (REAL, BROAD, QWEN2)}


def quick(tier: Tier) -> Tier:
    """The same in miniature: one seed, one share, one stream, few methods, a smaller model where there is a choice."""
    if tier.name == "real":
        methods: tuple[str, ...] = ("uniform", FTW, f"{FTW}+cluster_ucb")
        small = replace(tier, steps=16, target=16, test=24, retention=8)
    else:
        methods = ("uniform", FTW, f"{FTW}+cluster_ucb", "top_k", "everything")
        config = tier.model["config"] | {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
        small = replace(tier, model=tier.model | {"config": config}, warm_up_steps=150, steps=48, test=64, retention=32)
    return replace(small, seeds=1, shares=(25,), streams={"mixture": methods})


def plan(
    tiers: Sequence[Tier],
    streams: Sequence[str] | None = None,
    shares: Sequence[int] | None = None,
    methods: Sequence[str] | None = None,
    seeds: int | None = None,
) -> list[Run]:
    """The runs in order: seed by seed, the reference first. What is None is as the tier says.

    Methods that are asked for run on every stream that is; the reference always runs.
    """
    return [
        Run(tier, stream, share, method, seed)
        for tier in tiers
        for stream in (streams or tier.streams)
        for share in (shares or (tier.shares if stream == next(iter(tier.streams)) else tier.shares[:1]))
        for seed in range(seeds or tier.seeds)
        for method in _ordered(methods or tier.streams.get(stream, CORE))
    ]


def _ordered(methods: Sequence[str]) -> list[str]:
    return [REFERENCE, *(name for name in METHODS if name in methods and name != REFERENCE)]


def key(run: Run, fingerprint: str, threads: int) -> str:
    """File name of a run's result. It changes with anything that the result depends on but the code."""
    tier = asdict(replace(run.tier, seeds=0, shares=(), streams={}))
    method = asdict(METHODS[run.method]) | {"selection": selection_of(METHODS[run.method])}
    digest = _digest({"tier": tier, "method": method, "data": fingerprint, "threads": threads})
    name = run.method.replace("/", ".")
    return f"{run.tier.name}-{run.stream}-{run.share}-{name}-{run.seed}-{digest}.json"


def warm_up_key(tier: Tier, fingerprint: str) -> str:
    """Directory name of a warmed-up model."""
    parts = {"model": tier.model, "steps": tier.warm_up_steps, "tokens": tier.max_tokens, "prompt": tier.prompt_chars}
    return f"warm-{_digest(parts | {'data': fingerprint})}"


def _digest(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]
