"""Importance of hashed n-grams: how much more a sample looks like the target than like the stream, by its tokens alone.

After "Data Selection for Language Models via Importance Resampling" (DSIR, arXiv 2302.03169): a bag of hashed unigrams
and bigrams for the target and one for the raw data, a sample's weight the product of its n-grams' probability ratios,
and a draw without replacement by Gumbel noise on the log weights. Ours: n-grams of token ids instead of words, a draw
among the samples that wait instead of all data at once, raw counts that grow with the stream, and the smoothing.

Shape suffixes: M samples waiting, B buckets, G n-grams of all samples together.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gradient_selectors.features.hashing import Numbers, Tokens, Vector, laid_out, mix

BUCKETS = 10_000  # as published


def ngram_buckets(tokens: Tokens, buckets: int = BUCKETS) -> Numbers:
    """Buckets of a sample's L unigrams, then of its L - 1 bigrams, each in order: (2L - 1,) int64 below `buckets`.

    The same on every machine and in every process.

    Examples:
        >>> from gradient_selectors.features.ngrams import ngram_buckets
        >>> import numpy as np
        >>> ngram_buckets(np.array([7, 7, 7]), buckets=100).tolist()
        [87, 87, 87, 82, 82]
    """
    return _buckets_and_owners([tokens], buckets)[0]


def _buckets_and_owners(samples: Sequence[Tokens], buckets: int) -> tuple[Numbers, Numbers]:
    """The bucket of each n-gram of all samples, and the index of the sample it is of: (G,) int64 both."""
    ids, owners = laid_out(samples)
    tokens = ids.astype(np.uint64)
    unigrams = mix(tokens)
    within = owners[1:] == owners[:-1]
    bigrams = mix(unigrams[:-1] + tokens[1:])[within]
    buckets_G: Numbers = (np.concatenate([unigrams, bigrams]) % np.uint64(buckets)).astype(np.int64)
    return buckets_G, np.concatenate([owners, owners[1:][within]])


class NgramImportance:
    """Log ratios of n-gram probabilities, target over stream. The target's counts are fixed, the stream's grow.

    Of a bucket that the target has `t` times of `T` and the stream `s` times of `S`:

        q = (s + 1) / (S + B)        p = (t + B q) / (T + B)        ratio = log(p / q)

    The stream's counts are those of all samples that have left and of those that wait, so the ratios are the same
    wherever a run was interrupted. The published code adds 1e-8 to both probabilities, which suits large corpora. A
    small target lacks most n-grams by chance. So it is lent B n-grams, spread as the stream's are: what it lacks
    counts the same however rare it is in the stream, and the less, the smaller the target.

    Examples:
        >>> from gradient_selectors.features.ngrams import NgramImportance
        >>> import numpy as np
        >>> importance = NgramImportance([np.array([1, 2, 3, 1, 2, 3])])
        >>> waiting = [np.array(tokens) for tokens in ([1, 2, 3], [4, 5, 6], [3, 2, 1])]
        >>> like, other, shuffled = importance.scores(waiting)
        >>> bool(like > shuffled > other)
        True
        >>> importance.learn(waiting)  # once they have left
    """

    def __init__(self, target_tokens: Sequence[Tokens], buckets: int = BUCKETS) -> None:
        """`target_tokens`: of each target sample. Raises ValueError if there is not one token, or no bucket."""
        if buckets < 1:
            raise ValueError(f"buckets is {buckets}: hash n-grams to at least 1")
        if not any(len(tokens) for tokens in target_tokens):
            raise ValueError(f"target_tokens has no token in {len(target_tokens)} samples: give samples of the target")
        self._buckets, self._num_target = buckets, len(target_tokens)
        self._target_G, self._owners_G = _buckets_and_owners(target_tokens, buckets)
        self._target_B = self._counted(self._target_G)
        _, places_G, counts = np.unique(
            self._owners_G * buckets + self._target_G, return_inverse=True, return_counts=True
        )
        self._own_G: Numbers = counts[places_G]  # how often its own sample has an n-gram's bucket
        self._gone_B = np.zeros(buckets, dtype=np.int64)

    def log_weights(self, waiting: Sequence[Tokens]) -> Vector:
        """Sum of each sample's log ratios, (M,) float64: the published weight, which grows with length."""
        return self._log_weights_and_lengths(waiting)[0]

    def scores(self, waiting: Sequence[Tokens]) -> Vector:
        """Mean of each sample's log ratios, (M,) float64, in nats per n-gram; 0 for one without tokens."""
        weights_M, lengths_M = self._log_weights_and_lengths(waiting)
        return weights_M / np.maximum(lengths_M, 1)

    def target_scores(self, waiting: Sequence[Tokens]) -> Vector:
        """The same of the target's T samples, each by the counts of the others alone: (T,), 0 for one without tokens.

        `waiting`: what the stream's counts are of, beside what has left.
        """
        stream_B = self._gone_B + self._counted(_buckets_and_owners(waiting, self._buckets)[0])
        probs_G = self._stream_probs(stream_B)[self._target_G]
        lengths_T = np.bincount(self._owners_G, minlength=self._num_target)
        others_G = self._target_B[self._target_G] - self._own_G + self._buckets * probs_G
        ratios_G = np.log(others_G / (len(self._target_G) - lengths_T[self._owners_G] + self._buckets) / probs_G)
        sums_T = np.bincount(self._owners_G, weights=ratios_G, minlength=self._num_target).astype(np.float64)
        return sums_T / np.maximum(lengths_T, 1)

    def learn(self, gone: Sequence[Tokens]) -> None:
        """Count the n-grams of samples that have left."""
        self._gone_B += self._counted(_buckets_and_owners(gone, self._buckets)[0])

    def state_dict(self) -> dict[str, Tensor]:
        """Counts of what has left; the target's follow from the settings."""
        return {"gone_B": torch.from_numpy(self._gone_B.copy())}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`. Raises ValueError, changing nothing, if it has another number of buckets."""
        gone_B: Numbers = state["gone_B"].numpy()
        if len(gone_B) != self._buckets:
            raise ValueError(
                f"buckets is {self._buckets}, the state has {len(gone_B)}: use the number it was saved with"
            )
        self._gone_B = gone_B.copy()

    def _log_weights_and_lengths(self, waiting: Sequence[Tokens]) -> tuple[Vector, Numbers]:
        buckets_G, owners_G = _buckets_and_owners(waiting, self._buckets)
        ratios_G = self._log_ratios(self._gone_B + self._counted(buckets_G))[buckets_G]
        weights_M = np.bincount(owners_G, weights=ratios_G, minlength=len(waiting)).astype(np.float64)
        return weights_M, np.bincount(owners_G, minlength=len(waiting))

    def _log_ratios(self, stream_B: Numbers) -> Vector:
        stream_probs_B = self._stream_probs(stream_B)
        target_probs_B = (self._target_B + self._buckets * stream_probs_B) / (self._target_B.sum() + self._buckets)
        ratios_B: Vector = np.log(target_probs_B / stream_probs_B)
        return ratios_B

    def _stream_probs(self, stream_B: Numbers) -> Vector:
        probs_B: Vector = (stream_B + 1) / (stream_B.sum() + self._buckets)
        return probs_B

    def _counted(self, buckets_G: Numbers) -> Numbers:
        return np.bincount(buckets_G, minlength=self._buckets)
