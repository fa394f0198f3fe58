"""Fluency against counts in dictionaries."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from gradient_selectors.features.fluency import Fluency
from gradient_selectors.features.hashing import Tokens


def arrays(*texts: list[int]) -> list[Tokens]:
    return [np.array(text, dtype=np.int64) for text in texts]


def corpus(count: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 30, rng.integers(0, 40)).tolist() for _ in range(count)]


def test_scores_are_mean_information_of_pairs_by_counts() -> None:
    gone, waiting = corpus(20, seed=0), corpus(10, seed=1)
    fluency = Fluency()
    fluency.learn(arrays(*gone[:11]))
    fluency.learn(arrays(*gone[11:]))
    pairs = Counter(pair for text in gone for pair in pairwise(text))
    singles = Counter(token for text in gone for token in text)
    total = sum(singles.values())
    expected = []
    for text in waiting:
        found = [math.log((pairs[a, b] + 1) / (singles[a] * singles[b] / total + 1)) for a, b in pairwise(text)]
        expected.append(sum(found) / len(found) if found else math.nan)
    assert fluency.scores(arrays(*waiting)).tolist() == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_nothing_is_said_before_anything_was_counted() -> None:
    assert Fluency().scores(arrays([1, 2, 3], [])).tolist() == [0.0, 0.0]


def test_shuffled_texts_score_lower() -> None:
    rng = np.random.default_rng(2)
    chain = [(7 * i) % 101 for i in range(60)]  # each token has one successor
    fluency = Fluency()
    fluency.learn(arrays(*[chain] * 10))
    in_order, shuffled = fluency.scores(arrays(chain, rng.permutation(chain).tolist()))
    assert in_order > shuffled + 0.5


def test_counting_goes_on_from_a_state() -> None:
    one, other = Fluency(), Fluency()
    one.learn(arrays(*corpus(5, seed=3)))
    other.load_state_dict(one.state_dict())
    for fluency in (one, other):
        fluency.learn(arrays(*corpus(5, seed=4)))
    waiting = arrays(*corpus(6, seed=5))
    np.testing.assert_array_equal(one.scores(waiting), other.scores(waiting))
