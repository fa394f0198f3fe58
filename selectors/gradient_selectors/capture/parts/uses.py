"""Parameters that a module uses in the midst of what it computes, where no hook on its output can tell them apart.

A router is a linear map and, in the same breath, the choice of experts by its outcome. OPT's positions are a lookup of
numbers that the module makes itself. gpt-oss spreads a vector of attention sinks over all tokens. While such a module
runs, each use of its own parameters is caught where torch computes it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gradient_selectors.capture.factors import Written
from gradient_selectors.capture.kinds import Factors, MakeFactors, Rows, lookup_factors, matrix_factors
from gradient_selectors.capture.verification import replaced

PRODUCT, LOOKUP, SPREAD = "product", "lookup", "spread"

Tap = Callable[[str, Tensor, Tensor], Tensor]
"""Takes (kind of use, its output, its input); returns the output to go on with."""


class UsesWithin(TorchFunctionMode):
    """Within it, what is computed with a module's own parameters goes through `tap`."""

    def __init__(self, module: nn.Module, tap: Tap) -> None:
        super().__init__()
        self.own = list(module._parameters.values())
        self.shaped: Tensor | None = None
        self.tap = tap

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in (F.linear, F.embedding) and len(args) > 1 and self._is_own(args[1]):
            return self.tap(PRODUCT if func is F.linear else LOOKUP, output, args[0])
        if func is Tensor.reshape and self._is_own(args[0]):
            self.shaped = output
        elif func is Tensor.expand and args[0] is self.shaped and self.shaped is not None:
            return self.tap(SPREAD, output, output)
        return output

    def _is_own(self, value: Any) -> bool:
        return any(value is parameter for parameter in self.own)


def kinds_of_use(model: Any, modules: Mapping[str, nn.Module], inputs: Mapping[str, Any]) -> dict[str, MakeFactors]:
    """How each of some modules uses its parameters, seen in one forward pass; without those of no known use."""
    seen: dict[str, set[str]] = {name: set() for name in modules}

    def watched(name: str, *args: Any, **kwargs: Any) -> Any:
        def tap(kind: str, output: Tensor, _inputs: Tensor) -> Tensor:
            seen[name].add(kind)
            return output

        with UsesWithin(modules[name], tap):
            return type(modules[name]).forward(modules[name], *args, **kwargs)

    with torch.no_grad(), replaced({module: partial(watched, name) for name, module in modules.items()}):
        model(**inputs)
    found = {name: _make_factors(modules[name], kinds) for name, kinds in seen.items()}
    return {name: make for name, make in found.items() if make is not None}


def _make_factors(module: nn.Module, kinds: set[str]) -> MakeFactors | None:
    """Right or not at all: a module whose formula this is not shows when gradients are compared with autograd's."""
    names = {name for name, parameter in module._parameters.items() if parameter is not None}
    if kinds == {PRODUCT} and names <= {"weight", "bias"}:
        return partial(matrix_factors, "bias" in names, False)
    if kinds == {LOOKUP} and names == {"weight"} and isinstance(module, nn.Embedding) and module.max_norm is None:
        return partial(lookup_factors, module.padding_idx, 1.0)
    if kinds == {SPREAD} and len(names) == 1:
        return partial(_spread_factors, names.pop())
    return None


def _spread_factors(name: str, _inputs: Tensor, grad: Tensor, rows: Rows) -> Factors:
    """Of a vector (H) that was spread to (N, H, ...)."""
    return {name: Written(grad.float().flatten(2).sum(2).reshape(rows.num_samples, -1))}
