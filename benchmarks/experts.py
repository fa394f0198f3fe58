"""What a mixture of experts costs beside a dense model of as many active weights: time of a pass, bytes of its factors.

python -m benchmarks.experts [--samples 8] [--tokens 128] [--repeats 5]
"""

import argparse
import statistics
import time
from typing import Any

import torch
from gradient_selectors import Batch, GradientCapture
from gradient_selectors.capture.gradients import PoolGradients
from torch import Tensor

from stream_trainer.models.loading import load_model
from stream_trainer.settings.schema import ModelSettings

WIDTH, CHOSEN, EXPERTS = 256, 2, 8
COMMON = {
    "vocab_size": 2048,
    "hidden_size": WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"model_type": "mistral", "intermediate_size": CHOSEN * WIDTH},
    "experts": {
        "model_type": "mixtral",
        "intermediate_size": WIDTH,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
    },
}


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    ids = torch.randint(2048, (args.samples, args.tokens), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, ids, (args.tokens,) * args.samples)
    for name, config in MODELS.items():
        print(f"{name:8} {measured(COMMON | config, batch, args.repeats)}")


def measured(config: dict[str, Any], batch: Batch, repeats: int) -> str:
    """Weights, median time of a pass and of the update, and bytes of factors."""
    model = load_model(ModelSettings(config=config, tokenizer="bytes"), seed=0).model
    capture, weights_N = GradientCapture(model), torch.ones(len(batch))
    capture.run(batch)
    passes, updates = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        gradients = capture.run(batch)
        middle = time.perf_counter()
        gradients.weighted_gradient(weights_N)
        passes.append(middle - start)
        updates.append(time.perf_counter() - middle)
    count = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{count / 1e6:6.1f} M weights, pass {statistics.median(passes) * 1e3:7.1f} ms, "
        f"update {statistics.median(updates) * 1e3:7.1f} ms, factors {factor_bytes(gradients) / 1e6:7.1f} MB"
    )


def factor_bytes(gradients: PoolGradients) -> int:
    """Bytes of all tensors that factors hold, each counted once."""
    tensors = (v for found in gradients.factors.values() for f in found for v in vars(f).values())
    held = {value.data_ptr(): value.nbytes for value in tensors if isinstance(value, Tensor)}
    return sum(held.values())


if __name__ == "__main__":
    main()
