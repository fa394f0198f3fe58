"""Hashes of tokens that are the same on every machine and in every process."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Tokens = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]
Vector = npt.NDArray[np.float64]
BASE = np.uint64(0x9E3779B97F4A7C15)


def laid_out(samples: Sequence[Tokens]) -> tuple[Tokens, Numbers]:
    """The tokens of all samples one after another, and the index of the sample that each is of.

    Examples:
        >>> from gradient_selectors.features.hashing import laid_out
        >>> import numpy as np
        >>> tokens, owners = laid_out([np.array([5, 7]), np.array([9])])
        >>> tokens.tolist(), owners.tolist()
        ([5, 7, 9], [0, 0, 1])
    """
    tokens = np.concatenate([np.empty(0, dtype=np.int64), *samples])
    return tokens, np.repeat(np.arange(len(samples)), [len(sample) for sample in samples])


def mix(values: Hashes) -> Hashes:
    """SplitMix64: each bit of the result depends on every bit of the value.

    Examples:
        >>> from gradient_selectors.features.hashing import mix
        >>> import numpy as np
        >>> hex(mix(np.zeros(1, dtype=np.uint64))[0])
        '0xe220a8397b1dcdaf'
    """
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def shingles(
    samples: Sequence[Tokens], counted: Sequence[Flags] | None = None, length: int = 8, kept: int = 32
) -> list[Hashes]:
    """Of each sample the `kept` smallest hashes of its runs of `length` tokens, sorted: two samples share as many as
    they have text in common (Broder 1997, bottom-k sketch). A sample shorter than a run has none.

    `counted`: of each sample, the tokens that a run may end in; all by default.

    Examples:
        >>> from gradient_selectors.features.hashing import shingles
        >>> import numpy as np
        >>> text = np.arange(40)
        >>> whole, copy, other = shingles([text, text, text + 100])
        >>> np.isin(copy, whole).mean(), np.isin(other, whole).mean()
        (np.float64(1.0), np.float64(0.0))
    """
    lengths = [len(tokens) for tokens in samples]
    hashes = mix(laid_out(samples)[0].astype(np.uint64))
    runs = np.zeros(max(0, len(hashes) - length + 1), dtype=np.uint64)
    for shift in range(length):  # a polynomial in an odd number, modulo 2^64
        runs = runs * BASE + hashes[shift : shift + len(runs)]
    runs, found, start = mix(runs), [], 0
    for i, tokens in enumerate(lengths):
        own = runs[start : start + max(0, tokens - length + 1)]
        own = np.sort(own if counted is None else own[counted[i][length - 1 :]])[: 2 * kept]
        found.append(own[np.append(True, own[1:] != own[:-1])[: len(own)]][:kept])
        start += tokens
    return found
