"""AdamW with its two moments in 8 bits: 2 bytes a weight instead of 8. The update itself is bitsandbytes'.

Each moment is held in blocks of 256 weights, a byte for each and a scale for the block (Dettmers et al., arXiv
2110.02861). Small parameters keep float32. Import it only where it is wanted: bitsandbytes is an extra.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from bitsandbytes.functional import dequantize_blockwise
from bitsandbytes.optim import AdamW8bit
from gradient_selectors.mask.masked_adamw import parameters_by_name
from gradient_selectors.preconditioner import AdamPreconditioner, Preconditioner, plain
from torch import Tensor, nn

BLOCK = 256
TABLES = {"qmap1": "dynamic", "qmap2": "udynamic"}  # what a byte stands for: the same for all, so it is not saved


class NamedAdamW8bit(AdamW8bit):  # type: ignore[misc]
    """AdamW in 8 bits, whose state goes by parameter name as that of `NamedAdamW` does.

    State of a parameter: `step`, and for each moment i of 1 and 2 `state<i>` in the parameter's shape, uint8 with
    `absmax<i>` (blocks,) float32, or float32 without.
    """

    density = 1.0

    def __init__(self, params: Iterable[dict[str, Any]], **options: Any) -> None:
        """`params`: groups of (name, parameter) pairs."""
        super().__init__(params, **options)
        self.parameters = parameters_by_name(self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """Without the settings of groups: these stay as they are given. Tensors share memory with the live ones."""
        return {
            f"{name}.{field}": torch.as_tensor(value)
            for name, parameter in self.parameters.items()
            for field, value in self.state.get(parameter, {}).items()
            if field not in TABLES
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], move_to_device: bool = True) -> None:  # noqa: ARG002
        """Take over a copy of what `state_dict` returned. Raises ValueError, naming a parameter that does not fit."""
        found: dict[nn.Parameter, dict[str, Any]] = {}
        for key, tensor in state_dict.items():
            name, _, field = key.rpartition(".")
            found.setdefault(self._checked(name, field, tensor), {})[field] = tensor.clone()
        self.fill_qmap()
        self.state.clear()
        for parameter, fields in found.items():
            self.state[parameter] = self._live(fields, parameter.device)

    def current_preconditioner(self, *, warm: bool) -> Preconditioner:
        """P of the next step, from the second moment as it is held; plain until the moments may be trusted."""
        if not warm:
            return plain
        shared = AdamPreconditioner.of(self, self.parameters)

        def diagonal(name: str) -> Tensor | None:
            parameter = self.parameters[name]
            state = self.state.get(parameter)
            if not state:
                return None
            own = {"step": state["step"], "exp_avg_sq": second_moment(state)}
            return replace(shared, states={parameter: own})(name)

        return diagonal

    def _checked(self, name: str, field: str, tensor: Tensor) -> nn.Parameter:
        """The parameter that a tensor of a state belongs to."""
        if field in ("exp_avg", "exp_avg_sq", "kept"):
            raise ValueError("it was made with moments in float32; set optimizer.moments to float32")
        parameter = self.parameters.get(name)
        if parameter is None:
            raise ValueError(f"it holds optimizer state of {name}, which is not trained")
        if field in ("state1", "state2") and tensor.shape != parameter.shape:
            raise ValueError(f"{field} of {name} is {tuple(tensor.shape)}, not {tuple(parameter.shape)}")
        return parameter

    def _live(self, fields: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """A parameter's state as bitsandbytes has it."""
        live = {field: tensor.to(device) for field, tensor in fields.items() if field != "step"}
        if "absmax1" in fields:
            live |= {field: self.name2qmap[table].to(device) for field, table in TABLES.items()}
        return {"step": int(fields["step"]), **live}


def second_moment(state: dict[str, Any]) -> Tensor:
    """Adam's second moment of a parameter, in its shape, float32."""
    values: Tensor = state["state2"]
    if values.dtype == torch.float32:
        return values
    dense: Tensor = dequantize_blockwise(values, absmax=state["absmax2"], code=state["qmap2"], blocksize=BLOCK)
    return dense
