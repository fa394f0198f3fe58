"""Sums over ranks of many tensors, the small ones together: an exchange costs time however little it carries."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from gradient_selectors.world.base import World

BUCKET_ELEMENTS = 2**20


def summed_in_buckets(world: World, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor's sum over ranks, by name, in the order given. What is given may be overwritten.

    A call of all ranks, which give tensors of the same names, shapes and dtypes. No more than a bucket is held beside
    the tensor that is made next.

    Examples:
        >>> import torch
        >>> from gradient_selectors.world.base import Alone
        >>> from gradient_selectors.world.buckets import summed_in_buckets
        >>> [(name, values.tolist()) for name, values in summed_in_buckets(Alone(), [("a", torch.ones(2))])]
        [('a', [1.0, 1.0])]
    """
    bucket: dict[str, Tensor] = {}
    for name, values in tensors:
        if bucket and _is_full(bucket, values):
            yield from _summed(world, bucket)
            bucket = {}
        bucket[name] = values
    yield from _summed(world, bucket)


def _is_full(bucket: dict[str, Tensor], coming: Tensor) -> bool:
    others = [*bucket.values(), coming]
    return sum(values.numel() for values in others) > BUCKET_ELEMENTS or others[0].dtype != coming.dtype


def _summed(world: World, bucket: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    if len(bucket) < 2:  # in its own place
        yield from ((name, world.sum(values)) for name, values in bucket.items())
        return
    flat = world.sum(torch.cat([values.flatten() for values in bucket.values()]))
    parts = torch.split(flat, [values.numel() for values in bucket.values()])
    for (name, values), part in zip(bucket.items(), parts, strict=True):
        yield name, part.view(values.shape)
