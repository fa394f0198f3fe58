"""Samples on their way from the rank that read them to all others."""

import json
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch

from stream_trainer.records import Partition, Sample


def to_bytes(samples: Sequence[Sample]) -> bytes:
    """Samples without their records, whose bytes only their owner needs."""
    heads = [_head(sample) for sample in samples]
    tokens = [token for sample in samples for token in (*sample.input_ids, *sample.labels)]
    head = json.dumps(heads).encode()
    body = torch.tensor(tokens, dtype=torch.int64).numpy().tobytes()
    return len(head).to_bytes(8, "little") + head + body


def from_bytes(data: bytes) -> list[Sample]:
    """Inverse of `to_bytes`."""
    end = 8 + int.from_bytes(data[:8], "little")
    heads, body = json.loads(data[8:end]), data[end:]
    tokens = torch.frombuffer(bytearray(body), dtype=torch.int64).tolist() if body else []
    ends = [0, *accumulate(2 * head["num_tokens"] for head in heads)]
    return [_sample(head, tokens[lo:hi]) for head, (lo, hi) in zip(heads, pairwise(ends), strict=True)]


def _head(sample: Sample) -> dict[str, Any]:
    fields = {
        name: getattr(sample, name) for name in ("offset", "size", "weight", "timestamp", "id", "domain", "fields")
    }
    return {**fields, "partition": str(sample.partition), "num_tokens": sample.num_tokens}


def _sample(head: dict[str, Any], tokens: list[int]) -> Sample:
    count = head.pop("num_tokens")
    head["partition"] = Partition.parse(head["partition"])
    head["fields"] = tuple((name, value) for name, value in head["fields"])
    return Sample(tuple(tokens[:count]), tuple(tokens[count:]), **head)
