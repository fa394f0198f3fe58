"""Rotary embeddings that depend on how long a text is: dynamic scaling, LongRoPE.

transformers takes the longest of a batch for all, and dynamic scaling even remembers the longest so far. A sample would
then be computed in one way beside short ones and in another beside long ones. Here each is computed for its own length,
as it is when it is served alone. `Passes` numbers the positions of padding such that they lengthen nothing.
"""

from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("dynamic", "longrope")  # as transformers calls them


def by_length(model: nn.Module) -> list[nn.Module]:
    """The rotary embeddings of a model that depend on the length of a text."""
    return [module for module in model.modules() if any(_depends(kind) for kind in _kinds(module))]


def sample_by_sample(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> Any:
    """A forward hook on such a module: its output with every sample as if it were alone."""
    named = dict(zip(("x", "position_ids", "layer_type"), args, strict=False)) | kwargs
    positions_NT: Tensor = named.pop("position_ids")
    last_N = positions_NT.amax(-1)
    outputs: list[Tensor | None] = [None, None]
    for last in torch.unique(last_N):
        rows = (last_N == last).nonzero().squeeze(1)
        module.forward(**named, position_ids=torch.zeros_like(positions_NT[:1, :1]))  # what is remembered is forgotten
        found = module.forward(**named, position_ids=positions_NT[rows])
        for i, part in enumerate(found):
            whole = outputs[i]
            whole = part.new_empty(len(positions_NT), *part.shape[1:]) if whole is None else whole
            outputs[i] = whole.index_copy_(0, rows, part)
    return tuple(outputs)


def _kinds(module: Any) -> list[str]:
    kind = getattr(module, "rope_type", None)
    return [str(value) for value in (kind.values() if isinstance(kind, dict) else [kind])]


def _depends(kind: str) -> bool:
    return any(known in kind for known in KINDS)
