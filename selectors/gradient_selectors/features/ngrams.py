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
        own = self._owners_G * buckets + self._target_G
        _, places_G, counts = np.unique(own, return_inverse=True, return_counts=True)
        # How often the target's other samples have an n-gram's bucket, and how many n-grams they have.
        self._others_G = self._target_B[self._target_G] - counts[places_G]
        self._num_others_G = len(self._target_G) - np.bincount(self._owners_G)[self._owners_G]
        self._gone_B = np.zeros(buckets, dtype=np.int64)

    def log_weights(self, waiting: Sequence[Tokens]) -> Vector:
        """Sum of each sample's log ratios, (M,) float64: the published weight, which grows with length."""
        buckets_G, owners_G = _buckets_and_owners(waiting, self._buckets)
        return _sums(self._log_ratios(buckets_G, self._stream_probs(buckets_G)), owners_G, len(waiting))

    def scores(self, waiting: Sequence[Tokens]) -> Vector:
        """Mean of each sample's log ratios, (M,) float64, in nats per n-gram; 0 for one without tokens."""
        return self.scores_and_target_scores(waiting)[0]

    def scores_and_target_scores(self, waiting: Sequence[Tokens]) -> tuple[Vector, Vector]:
        """The same, and that of the target's T samples, each by the counts of the others alone, (T,)."""
        buckets_G, owners_G = _buckets_and_owners(waiting, self._buckets)
        probs_B = self._stream_probs(buckets_G)
        target_probs_G = probs_B[self._target_G]
        by_others_G = _log_ratio(self._others_G, self._num_others_G, target_probs_G, self._buckets)
        scores_M = _means(self._log_ratios(buckets_G, probs_B), owners_G, len(waiting))
        return scores_M, _means(by_others_G, self._owners_G, self._num_target)

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

    def _stream_probs(self, waiting_G: Numbers) -> Vector:
        """Of each bucket, (B,): in what has left and in what waits."""
        stream_B = self._gone_B + self._counted(waiting_G)
        probs_B: Vector = (stream_B + 1) / (stream_B.sum() + self._buckets)
        return probs_B

    def _log_ratios(self, buckets_G: Numbers, probs_B: Vector) -> Vector:
        return _log_ratio(self._target_B, self._target_B.sum(), probs_B, self._buckets)[buckets_G]

    def _counted(self, buckets_G: Numbers) -> Numbers:
        return np.bincount(buckets_G, minlength=self._buckets)


def _log_ratio(counts: Numbers, total: Numbers, probs: Vector, buckets: int) -> Vector:
    """The class's formula. `counts`: those of `total` n-grams of the target that are of a bucket; `probs`: its q."""
    ratios: Vector = np.log((counts + buckets * probs) / (total + buckets) / probs)
    return ratios


def _sums(ratios_G: Vector, owners_G: Numbers, num_samples: int) -> Vector:
    return np.bincount(owners_G, weights=ratios_G, minlength=num_samples).astype(np.float64)


def _means(ratios_G: Vector, owners_G: Numbers, num_samples: int) -> Vector:
    return _sums(ratios_G, owners_G, num_samples) / np.maximum(np.bincount(owners_G, minlength=num_samples), 1)
