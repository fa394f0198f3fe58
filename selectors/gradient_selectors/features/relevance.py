"""Relevance: how much of what is rare in a prompt and in its answer they have in common.

Names, numbers and subjects come back in an answer. In an answer to another prompt they do not, however fluent it is.

Shape suffixes: M samples, W distinct tokens of all samples together, D those of one sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradient_selectors.features.hashing import Flags, Tokens, Vector, laid_out

NOTHING = 1.0  # sum of squared weights below which a side says nothing: that of one token in 37 % of the samples


@dataclass(frozen=True, eq=False)
class Exchange:
    """A prompt and its answer as sets of tokens.

    Attributes:
        tokens_D: the sample's distinct tokens.
        asked_D: whether each is in the prompt: where no loss is.
        answered_D: whether each carries loss somewhere.
    """

    tokens_D: Tokens
    asked_D: Flags
    answered_D: Flags


NO_EXCHANGE = Exchange(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.bool_), np.empty(0, dtype=np.bool_))


def exchanges_of(samples: Sequence[Tokens], counted: Sequence[Flags]) -> list[Exchange]:
    """The sets of each sample, from its T token ids, at least 0 and below 2^32, and whether each carries loss.

    Examples:
        >>> from gradient_selectors.features.relevance import exchanges_of
        >>> import numpy as np
        >>> (exchange,) = exchanges_of([np.array([5, 7, 5, 9])], [np.array([False, False, True, True])])
        >>> exchange.tokens_D.tolist(), exchange.asked_D.tolist(), exchange.answered_D.tolist()
        ([5, 7, 9], [True, True, False], [True, False, True])
    """
    if not samples:
        return []
    tokens, owners = laid_out(samples)
    flags = np.concatenate(counted)
    # One sort of all samples: one for each would take ten times as long.
    keys_W, places = np.unique((owners << 32) | tokens, return_inverse=True)
    asked_W, answered_W = (np.zeros(len(keys_W), dtype=np.bool_) for _ in range(2))
    asked_W[places[~flags]] = True
    answered_W[places[flags]] = True
    bounds = np.searchsorted(keys_W >> 32, np.arange(1, len(samples)))
    parts = (np.split(values_W, bounds) for values_W in (keys_W & (2**32 - 1), asked_W, answered_W))
    return [Exchange(*sets) for sets in zip(*parts, strict=True)]


def exchanged(own: Sequence[Exchange]) -> list[Exchange]:
    """Each prompt with the answer of the next sample, the last one with that of the first.

    Examples:
        >>> from gradient_selectors.features.relevance import exchanged, exchanges_of
        >>> import numpy as np
        >>> own = exchanges_of([np.array([1, 2]), np.array([3, 4])], [np.array([False, True])] * 2)
        >>> [exchange.tokens_D.tolist() for exchange in exchanged(own)]
        [[1, 4], [2, 3]]
    """
    prompts = [exchange.tokens_D[exchange.asked_D] for exchange in own]
    answers = [exchange.tokens_D[exchange.answered_D] for exchange in own]
    pairs = list(zip(prompts, [*answers[1:], *answers[:1]], strict=True))
    counted = [np.arange(len(prompt) + len(answer)) >= len(prompt) for prompt, answer in pairs]
    return exchanges_of([np.concatenate(pair) for pair in pairs], counted)


def relevance(samples: Sequence[Exchange], among: Sequence[Exchange]) -> Vector:
    """TF-IDF cosine of each sample's prompt and answer, (M,) float64 in [0, 1]; not a number where either says nothing.

    A token counts once. Its inverse document frequency is that among N others, which hold all tokens of the samples:
    log((N + 1) / others that have it) (Salton and Buckley 1988). So a prompt of nothing but marks that every sample has
    says nothing.

    Examples:
        >>> from gradient_selectors.features.relevance import exchanges_of, relevance
        >>> import numpy as np
        >>> kept, swapped = np.array([1, 2, 3, 2, 3, 8]), np.array([1, 4, 5, 6, 7, 8])
        >>> answers = np.array([False, False, False, True, True, True])
        >>> both = exchanges_of([kept, swapped], [answers, answers])
        >>> relevance(both, among=both).round(2).tolist()
        [0.94, 0.0]
    """
    if not samples:
        return np.empty(0)
    tokens_W, owners_W = laid_out([exchange.tokens_D for exchange in samples])
    asked_W = np.concatenate([exchange.asked_D for exchange in samples])
    answered_W = np.concatenate([exchange.answered_D for exchange in samples])
    having = np.bincount(laid_out([exchange.tokens_D for exchange in among])[0])
    squares_W = np.square(np.log((len(among) + 1) / having[tokens_W]))

    def sums_over(flags_W: Flags) -> Vector:
        return np.bincount(owners_W, weights=squares_W * flags_W, minlength=len(samples)).astype(np.float64)

    asked_M, answered_M = sums_over(asked_W), sums_over(answered_W)
    cosines_M = np.full(len(samples), np.nan)
    says_M = np.minimum(asked_M, answered_M) >= NOTHING
    shared_M = sums_over(asked_W & answered_W)
    cosines_M[says_M] = shared_M[says_M] / np.sqrt(asked_M[says_M] * answered_M[says_M])
    return cosines_M
