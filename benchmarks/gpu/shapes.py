"""What is measured: Llama models of usual shapes, at usual lengths. Nothing here imports torch."""

from collections.abc import Iterable
from dataclasses import dataclass

CHOSEN = 4  # samples k that enter an update
SHORT = 512  # tokens; longer samples come in pools half as large


@dataclass(frozen=True)
class Shape:
    """A Llama.

    Attributes:
        checkpoints_from: tokens of a sample from which on activations are computed again in the backward pass.
        tied: the head is the embedding.
        lora_rank: rank of float32 adapters on a frozen bfloat16 base, or None to train all weights, in float32.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    checkpoints_from: int
    tied: bool = True
    lora_rank: int | None = None

    @property
    def weights(self) -> int:
        """Weights in matrix products, for one token."""
        attention = 2 * self.hidden**2 * (self.heads + self.kv_heads) // self.heads
        block = attention + 3 * self.hidden * self.intermediate
        return self.layers * block + self.hidden * self.vocabulary


@dataclass(frozen=True)
class Case:
    """A shape and the length T of its samples, in tokens."""

    shape: Shape
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.shape.name}, {self.tokens} tokens"

    @property
    def pool(self) -> int:
        """Candidates N of a step."""
        return (4 if self.tokens <= SHORT else 2) * CHOSEN

    @property
    def checkpointing(self) -> bool:
        """Whether every method computes activations again in the backward pass."""
        return self.tokens >= self.shape.checkpoints_from

    @property
    def work(self) -> int:
        """What the seconds of a step grow with: products of one forward pass, those of attention included."""
        return self.pool * self.tokens * (self.shape.weights + self.shape.layers * self.tokens * self.shape.hidden)


TINY = Shape("tiny", 2, 32, 64, 4, 2, vocabulary=64, checkpoints_from=16)
TINY_SHAPES = (TINY, Shape("tiny_lora", 2, 32, 64, 4, 2, vocabulary=64, checkpoints_from=16, lora_rank=2))
SHAPES = (
    Shape("135M", 30, 576, 1536, 9, 3, vocabulary=49152, checkpoints_from=2048),
    Shape("1B", 16, 2048, 8192, 32, 8, vocabulary=128256, checkpoints_from=512),
    Shape("7B_lora", 32, 4096, 11008, 32, 32, vocabulary=32000, checkpoints_from=512, tied=False, lora_rank=16),
)
TOKENS = (512, 2048, 8192)
TINY_TOKENS = (8, 16)


def cases(shapes: Iterable[Shape], tokens: Iterable[int]) -> list[Case]:
    """Every shape at every length, the cheapest first: where time runs out, the dearest are left out."""
    lengths = tuple(tokens)
    return sorted((Case(shape, length) for shape in shapes for length in lengths), key=lambda case: case.work)
