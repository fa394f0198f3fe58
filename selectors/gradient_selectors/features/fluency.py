"""Fluency: how well each token follows the one before it, by counts of the stream itself.

A text whose words were shuffled has the tokens of its kind, but not their pairs.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gradient_selectors.features.hashing import Numbers, Tokens, Vector, laid_out, mix

PAIRS, SINGLES = 2**20, 2**16  # buckets
GOLDEN = (5**0.5 - 1) / 2


class Fluency:
    """Mean pointwise mutual information of neighbouring tokens, from hashed counts: of tokens a and b out of n,

        log((n(a, b) + 1) / (n(a) n(b) / n + 1))

    The ones keep a pair of rare tokens, which has hardly had a chance to be seen, from saying anything. The counts are
    those of samples that have left: what waits is read again after a restart.

    Examples:
        >>> from gradient_selectors.features.fluency import Fluency
        >>> import numpy as np
        >>> fluency = Fluency()
        >>> fluency.learn([np.array([1, 2, 3, 4] * 8)])
        >>> in_order, shuffled = fluency.scores([np.array([1, 2, 3]), np.array([3, 1, 4])])
        >>> bool(in_order > shuffled)
        True
    """

    def __init__(self) -> None:
        self._pairs = np.zeros(PAIRS, dtype=np.float32)
        self._singles = np.zeros(SINGLES, dtype=np.float32)

    def scores(self, waiting: Sequence[Tokens]) -> Vector:
        """In nats per pair, (M,) float64; not a number without pairs, and 0 for all before anything was counted."""
        total = float(self._singles.sum())
        if not total:
            return np.zeros(len(waiting))
        pairs_G, first_G, second_G, owners_G = _pairs_of(waiting)
        expected_G = self._singles[first_G] * self._singles[second_G] / total
        information_G = np.log((self._pairs[pairs_G] + 1.0) / (expected_G + 1.0))
        sums_M = np.bincount(owners_G, weights=information_G, minlength=len(waiting))
        pairs_M = np.bincount(owners_G, minlength=len(waiting))
        means_M: Vector = np.where(pairs_M > 0, sums_M / np.maximum(pairs_M, 1), np.nan)
        return means_M

    def learn(self, gone: Sequence[Tokens]) -> None:
        """Count the pairs of samples that have left."""
        one = np.float32(1)  # of their own type: numpy adds another one ten times as slowly
        np.add.at(self._pairs, _pairs_of(gone)[0], one)
        np.add.at(self._singles, _single(laid_out(gone)[0]), one)

    def state_dict(self) -> dict[str, Tensor]:
        """The counts: copies."""
        return {"pairs": torch.from_numpy(self._pairs.copy()), "singles": torch.from_numpy(self._singles.copy())}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
        self._pairs, self._singles = state["pairs"].numpy().copy(), state["singles"].numpy().copy()


def disordered(tokens_T: Tokens) -> Tokens:
    """The same T tokens, pair by pair, in an order in which no two neighbouring pairs were near. No chance is in it.

    Half of all neighbours stay: words that were shuffled are still words, and have about two tokens. The order is that
    of the fractional parts of multiples of the golden ratio, which are as far apart as they can be (Knuth 1998,
    volume 3, section 6.4).

    Examples:
        >>> from gradient_selectors.features.fluency import disordered
        >>> import numpy as np
        >>> disordered(np.arange(10)).tolist()
        [0, 1, 4, 5, 8, 9, 2, 3, 6, 7]
    """
    pairs_T = np.arange(len(tokens_T)) // 2
    return tokens_T[np.argsort(pairs_T * GOLDEN % 1.0, kind="stable")]


def _single(tokens: Tokens) -> Numbers:
    buckets: Numbers = (mix(tokens.astype(np.uint64)) % np.uint64(SINGLES)).astype(np.int64)
    return buckets


def _pairs_of(samples: Sequence[Tokens]) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """Of each pair of neighbours: its bucket, those of its two tokens, and the sample it is of. (G,) int64 all."""
    tokens, owners = laid_out(samples)
    within = owners[1:] == owners[:-1]
    singles = _single(tokens)
    hashes = mix(mix(tokens[:-1].astype(np.uint64)) + tokens[1:].astype(np.uint64))
    pairs = (hashes % np.uint64(PAIRS)).astype(np.int64)
    return pairs[within], singles[:-1][within], singles[1:][within], owners[1:][within]
