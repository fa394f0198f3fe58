"""What is known of a sample before any pass."""

from dataclasses import dataclass

import numpy as np
import torch
from gradient_selectors.features.embeddings import EmbeddingFeatures
from gradient_selectors.features.traits import describe

FEATURES = EmbeddingFeatures(torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)))


@dataclass(frozen=True)
class Asked:
    """A sample with a prompt, which carries no loss."""

    prompt: list[int]
    answer: list[int]
    fields: tuple[tuple[str, str], ...] = ()

    @property
    def input_ids(self) -> list[int]:
        return self.prompt + self.answer

    @property
    def labels(self) -> list[int]:
        return [-100] * len(self.prompt) + self.answer


def test_a_prompt_that_many_share_makes_no_copies_and_an_answer_does() -> None:
    rng = np.random.default_rng(0)
    instructions, question, answer, other = (rng.integers(0, 1000, 40).tolist() for _ in range(4))
    first, second, copy = describe(
        [Asked(instructions, answer), Asked(instructions, other), Asked(question, answer)], FEATURES
    )
    assert not np.isin(first.shingles, second.shingles).any()
    assert np.isin(first.shingles, copy.shingles).mean() > 0.5


def test_what_carries_loss_is_the_answer_and_its_prompt_is_the_rest() -> None:
    (traits,) = describe([Asked([5, 7, 5], [7, 9])], FEATURES)
    assert traits.tokens.tolist() == [5, 7, 5, 7, 9]
    assert traits.answer.tolist() == [7, 9]
    exchange = traits.exchange
    assert exchange.tokens_D.tolist() == [5, 7, 9]
    assert exchange.asked_D.tolist() == [True, True, False]
    assert exchange.answered_D.tolist() == [False, True, True]
