"""Draws by likeness to the target alone: the most like it, or some at random of those that are much like it.

What a user would try before any gradient, and what gradients therefore have to beat.

Shape suffixes: M samples waiting, m of them near the target, R drawn lately, d embedding dimensions.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gradient_selectors.features.traits import Traits, embeddings_of


class Nearest:
    """Draws the samples most like the target: the largest cosines with its mean embedding, ties by index.

    Examples:
        >>> from gradient_selectors.draw.nearest import Nearest
        >>> from gradient_selectors.features.traits import Traits
        >>> import numpy as np
        >>> waiting = [Traits(np.array([0]), embedding_d) for embedding_d in torch.eye(3)]
        >>> Nearest(torch.tensor([0.2, 0.1, 0.9])).draw(waiting, count=2)
        [0, 2]
    """

    def __init__(self, target_d: Tensor) -> None:
        """`target_d`: mean embedding of the target samples, (d,), of any length."""
        self._target_d = target_d

    def draw(self, waiting: Sequence[Traits], count: int) -> list[int]:
        """`count` of the waiting samples, or all if there are fewer: indices in ascending order."""
        if not waiting:
            return []
        likeness_M = likeness(embeddings_of(waiting), self._target_d)
        return sorted(torch.argsort(-likeness_M, stable=True)[:count].tolist())

    def learn(self, gone: Sequence[Traits]) -> None:
        """Nothing: the target stays as it is."""


class NearRandom:
    """Draws at random of the samples most like the target, and no near copies of what was drawn lately.

    The nearest of all are often copies of one another, which teach no more than one of them.

    Examples:
        >>> from gradient_selectors.draw.nearest import NearRandom
        >>> from gradient_selectors.features.traits import Traits
        >>> import numpy as np
        >>> waiting = [Traits(np.array([0]), torch.eye(3)[kind]) for kind in (0, 1, 2, 0, 0, 0)]
        >>> draw = NearRandom(torch.eye(3)[0], torch.Generator().manual_seed(0), share=0.5)
        >>> len(draw.draw(waiting, count=1)), draw.draw(waiting, count=1)  # of kind 0, then no copy of it
        (1, [1])
    """

    def __init__(
        self,
        target_d: Tensor,
        generator: torch.Generator,
        share: float = 0.25,
        copies: float | None = 0.97,
        recent: int = 64,
    ) -> None:
        """Raises ValueError if a setting is out of its range.

        Args:
            target_d: mean embedding of the target samples, (d,), of any length.
            generator: source of the random draws, on the CPU.
            share: share of the samples to draw from, above 0 and at most 1.
            copies: two samples with a larger cosine are copies of each other; None takes copies like all others.
            recent: how many of the last drawn samples are remembered, at least 1.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}: draw from a share above 0 and at most 1")
        if recent < 1:
            raise ValueError(f"recent is {recent}: remember at least 1 sample, or take copies with copies=None")
        self._target_d, self._generator = target_d, generator
        self._share, self._copies, self._recent = share, copies, recent
        self._recent_Rd = torch.empty(0, len(target_d))

    def draw(self, waiting: Sequence[Traits], count: int) -> list[int]:
        """`count` of the waiting samples, or all if there are fewer: indices in ascending order.

        The share is of those that are no copy of what was drawn lately, rounded up. Copies are taken only when there
        are not enough others: of what was drawn lately when less than `count` else wait, of one another when less
        than `count` else are in the share. O(M d R).
        """
        if not waiting or count < 1:
            return []
        embeddings_Md = embeddings_of(waiting)
        near_m = self._near(embeddings_Md, count)
        shuffled_m = near_m[torch.randperm(len(near_m), generator=self._generator)]
        drawn = shuffled_m[self._first_without_copies(embeddings_Md[shuffled_m], count)].sort().values
        if self._copies is not None:
            self._recent_Rd = torch.cat([self._recent_Rd, embeddings_Md[drawn]])[-self._recent :]
        return [int(index) for index in drawn]

    def learn(self, gone: Sequence[Traits]) -> None:
        """Nothing: what was drawn is remembered by `draw`."""

    def _near(self, embeddings_Md: Tensor, count: int) -> Tensor:
        """The samples to draw from: copies come last, before that the most like the target comes first."""
        order_M = torch.argsort(-likeness(embeddings_Md, self._target_d), stable=True)
        if self._copies is None or len(self._recent_Rd) == 0:
            return order_M[: max(count, math.ceil(self._share * len(order_M)))]
        stale_M = (embeddings_Md @ self._recent_Rd.T > self._copies).any(1)[order_M]
        fresh = order_M[~stale_M]
        size = max(count, math.ceil(self._share * len(fresh)))
        return torch.cat([fresh, order_M[stale_M]])[:size]

    def _first_without_copies(self, embeddings_md: Tensor, count: int) -> list[int]:
        """The first `count` that are no copies of those taken before; if there are fewer, the first of the rest too."""
        places = list(range(len(embeddings_md)))
        if self._copies is None:
            return places[:count]
        alike_mm = (embeddings_md @ embeddings_md.T > self._copies).numpy()
        taken: list[int] = []
        for place in places:
            if len(taken) < count and not alike_mm[place, taken].any():
                taken.append(place)
        return [*taken, *(place for place in places if place not in taken)][:count]

    def state_dict(self) -> dict[str, Tensor]:
        """Embeddings of what was drawn lately, oldest first, (R, d) float32, and the generator: copies."""
        return {"recent_Rd": self._recent_Rd.clone(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`. Raises ValueError, changing nothing, if embeddings are of another size."""
        found, expected = state["recent_Rd"].shape[1], len(self._target_d)
        if found != expected:
            raise ValueError(
                f"embeddings have {expected} dimensions, the state's {found}: use the model it was saved with"
            )
        self._recent_Rd = state["recent_Rd"][-self._recent :].clone()
        self._generator.set_state(state["generator"])


def likeness(embeddings_Md: Tensor, target_d: Tensor) -> Tensor:
    """Cosine of each unit vector with the target, (M,) float32. Equal embeddings are equally like it.

    Summed in float64: what a kernel rounds one way in one row and another way in the next is then out of sight.
    """
    return (embeddings_Md.double() @ F.normalize(target_d.double(), dim=0)).float()
