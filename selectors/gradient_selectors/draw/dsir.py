"""A draw by the importance of hashed n-grams, DSIR (arXiv 2302.03169), among the samples that wait."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gradient_selectors.features.ngrams import NgramImportance
from gradient_selectors.features.traits import Traits


class Dsir:
    """Draws in proportion to the n-grams' importance, without replacement, as DSIR does.

    Weights are products over all n-grams of a sample. Those of two samples differ by far more than the noise, so the
    draw is close to taking the largest, and long samples come first.

    Examples:
        >>> from gradient_selectors.draw.dsir import Dsir
        >>> from gradient_selectors.features.ngrams import NgramImportance
        >>> from gradient_selectors.features.traits import Traits
        >>> import numpy as np
        >>> draw = Dsir(NgramImportance([np.arange(50)]), torch.Generator().manual_seed(0))
        >>> waiting = [Traits(np.arange(first, first + 50), torch.ones(1)) for first in (100, 0, 200, 10)]
        >>> draw.draw(waiting, count=2)
        [1, 3]
        >>> draw.learn([waiting[1], waiting[3]])
    """

    def __init__(self, importance: NgramImportance, generator: torch.Generator) -> None:
        """`importance` is this draw's own: it learns from every sample once."""
        self._importance = importance
        self._generator = generator

    def draw(self, waiting: Sequence[Traits], count: int) -> list[int]:
        """`count` of the waiting samples, or all if there are fewer: indices in ascending order."""
        # Minus the log of an exponential variable is a Gumbel variable: the largest sums are then a weighted draw.
        waits_M = torch.empty(len(waiting), dtype=torch.float64).exponential_(generator=self._generator).numpy()
        keys_M = self._importance.log_weights([traits.tokens for traits in waiting]) - np.log(waits_M)
        return sorted(np.argsort(-keys_M, kind="stable")[:count].tolist())

    def learn(self, gone: Sequence[Traits]) -> None:
        """Count the n-grams of samples that have left, drawn or not."""
        self._importance.learn([traits.tokens for traits in gone])

    def state_dict(self) -> dict[str, Tensor]:
        """The counts and the generator: copies."""
        return {**self._importance.state_dict(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`. Raises ValueError, changing nothing, if it has another number of buckets."""
        self._importance.load_state_dict(state)
        self._generator.set_state(state["generator"])
