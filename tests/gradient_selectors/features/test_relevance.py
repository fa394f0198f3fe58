"""Relevance against vectors over the whole vocabulary."""

import math

import numpy as np
import pytest
from gradient_selectors.features.relevance import NOTHING, Exchange, exchanged, exchanges_of, relevance

VOCABULARY = 40


def exchange(prompt: list[int], answer: list[int]) -> Exchange:
    tokens = np.array([*prompt, *answer], dtype=np.int64)
    return exchanges_of([tokens], [np.arange(len(tokens)) >= len(prompt)])[0]


def some(count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 15, (count, 2))
    return [(rng.integers(0, VOCABULARY, a).tolist(), rng.integers(0, VOCABULARY, b).tolist()) for a, b in lengths]


def test_it_is_the_cosine_of_tf_idf_vectors() -> None:
    texts = some(30, seed=0)
    others = [*texts[:20], *some(30, seed=3)]  # not all of those that are asked about, but all of their tokens
    has = np.array([[token in [*prompt, *answer] for token in range(VOCABULARY)] for prompt, answer in others])
    weights = np.log((len(others) + 1) / np.maximum(1, has.sum(0)))
    found_M = relevance(*([exchange(*text) for text in side] for side in (texts, others)))
    for (prompt, answer), found in zip(texts, found_M, strict=True):
        asked, answered = (weights * np.isin(np.arange(VOCABULARY), side) for side in (prompt, answer))
        lengths = float(np.linalg.norm(asked)), float(np.linalg.norm(answered))
        if min(lengths) ** 2 < NOTHING:
            assert math.isnan(found)
        else:
            assert found == pytest.approx(float(asked @ answered) / math.prod(lengths))


def test_answers_to_other_prompts_have_less_in_common_with_theirs() -> None:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 2000, 20).tolist() for _ in range(40)]
    answers = [[*rng.choice(prompt, 5).tolist(), *rng.integers(0, 2000, 15).tolist()] for prompt in prompts]
    own = [exchange(*pair) for pair in zip(prompts, answers, strict=True)]
    assert relevance(own, own).min() > relevance(exchanged(own), own).max()


@pytest.mark.parametrize("prompt", [[], [0], [0, 1]], ids=["none", "a mark", "what all have"])
def test_a_prompt_that_says_nothing_has_no_relevance(prompt: list[int]) -> None:
    texts = [(prompt, [0, 1, *range(first, first + 8)]) for first in range(2, 200, 8)]
    samples = [exchange(*text) for text in texts]
    assert np.isnan(relevance(samples, samples)).all()


def test_there_may_be_nothing() -> None:
    assert relevance([], []).tolist() == []
    assert np.isnan(relevance([exchange([], [])], [exchange([], [])])).all()
    assert exchanged([]) == []


def test_sets_are_those_of_each_sample_alone() -> None:
    texts = some(30, seed=2)
    tokens = [np.array([*prompt, *answer], dtype=np.int64) for prompt, answer in texts]
    counted = [np.arange(len(ids)) >= len(prompt) for ids, (prompt, _) in zip(tokens, texts, strict=True)]
    found = exchanges_of(tokens, counted)
    assert len(found) == len(texts)
    for (prompt, answer), sets in zip(texts, found, strict=True):
        assert sets.tokens_D.tolist() == sorted({*prompt, *answer})
        assert sets.tokens_D[sets.asked_D].tolist() == sorted(set(prompt))
        assert sets.tokens_D[sets.answered_D].tolist() == sorted(set(answer))
    assert exchanges_of([], []) == []


def test_an_exchanged_sample_has_its_own_prompt_and_the_next_answer() -> None:
    texts = some(6, seed=4)
    for i, sets in enumerate(exchanged([exchange(*text) for text in texts])):
        assert sets.tokens_D[sets.asked_D].tolist() == sorted(set(texts[i][0]))
        assert sets.tokens_D[sets.answered_D].tolist() == sorted(set(texts[(i + 1) % 6][1]))
