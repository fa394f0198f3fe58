"""Fluency against counts in dictionaries."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from gradient_selectors.features.fluency import Fluency
from gradient_selectors.features.traits import Traits


def traits_of(*texts: list[int]) -> list[Traits]:
    return [Traits(np.array(text, dtype=np.int64), torch.ones(1)) for text in texts]


def corpus(count: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 30, rng.integers(0, 40)).tolist() for _ in range(count)]


def test_scores_are_mean_information_of_pairs_by_counts() -> None:
    gone, waiting = corpus(20, seed=0), corpus(10, seed=1)
    fluency = Fluency()
    fluency.learn(traits_of(*gone[:11]))
    fluency.learn(traits_of(*gone[11:]))
    pairs = Counter(pair for text in gone for pair in pairwise(text))
    singles = Counter(token for text in gone for token in text)
    total = sum(singles.values())
    expected = []
    for text in waiting:
        found = [math.log((pairs[a, b] + 1) / (singles[a] * singles[b] / total + 1)) for a, b in pairwise(text)]
        expected.append(sum(found) / max(1, len(found)))
    assert fluency.scores(traits_of(*waiting)).tolist() == pytest.approx(expected, rel=1e-5)


def test_nothing_is_said_before_anything_was_counted() -> None:
    assert Fluency().scores(traits_of([1, 2, 3], [])).tolist() == [0.0, 0.0]


def test_shuffled_texts_score_lower() -> None:
    rng = np.random.default_rng(2)
    chain = [(7 * i) % 101 for i in range(60)]  # each token has one successor
    fluency = Fluency()
    fluency.learn(traits_of(*[chain] * 10))
    in_order, shuffled = fluency.scores(traits_of(chain, rng.permutation(chain).tolist()))
    assert in_order > shuffled + 0.5


def test_counting_goes_on_from_a_state() -> None:
    one, other = Fluency(), Fluency()
    one.learn(traits_of(*corpus(5, seed=3)))
    other.load_state_dict(one.state_dict())
    for fluency in (one, other):
        fluency.learn(traits_of(*corpus(5, seed=4)))
    waiting = traits_of(*corpus(6, seed=5))
    assert one.scores(waiting).tolist() == other.scores(waiting).tolist()
