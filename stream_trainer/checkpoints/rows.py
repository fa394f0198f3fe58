"""State that lies in rows on several ranks: each writes its own, and whoever goes on reads its own.

    optimizer-00001-of-00002.safetensors    what rank 0 has, by the names that it has in one file for all
    optimizer.index.json                    the files, and at which row of each parameter each of them begins
    state-00001-of-00002.safetensors        what rank 0 has of the rest, by path

`kept` of a masked parameter are positions in the whole one. Not written with torch.distributed.checkpoint: it pickles
its metadata, in a file or between ranks, and knows no moments of some weights alone.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gradient_selectors.capture.shards import lying_as, own_rows, span_here
from gradient_selectors.mask.cohorts import joined, state_between
from gradient_selectors.world.deal import spans_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stream_trainer.checkpoints.manifest import Sealed, seal
from stream_trainer.checkpoints.trouble import writing

OF_OPTIMIZER, OF_PARTS = "optimizer", "state"
INDEX = "optimizer.index.json"


@dataclass(frozen=True)
class InRows:
    """What the ranks have written of a checkpoint that is not whole yet.

    Attributes:
        directory: where, which only they know.
        files: what each is to be, by name.
    """

    directory: Path
    files: Mapping[str, Sealed]


def own_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of a state what lies here, contiguous: nothing else can be written."""
    return {key: own_rows(values).detach().contiguous() for key, values in state.items()}


def write_own(directory: Path, of: str, state: Mapping[str, Any], rank: int, size: int) -> dict[str, Sealed]:
    """Write a rank's part of the state `of` something, durably. Raises CheckpointError."""
    with writing(f"the {of}", directory):
        path = directory / _name(of, rank, size)
        save_file(own_tensors(state), path)
        return {path.name: seal(path)}


def write_index(directory: Path, parameters: Mapping[str, nn.Parameter], size: int) -> None:
    """Write which rows of the parameters are in which file. Raises CheckpointError."""
    rows = {
        name: {"shape": list(parameter.shape), "begins": [first for first, _ in spans_of(size, len(parameter))]}
        for name, parameter in parameters.items()
    }
    index = {"files": [_name(OF_OPTIMIZER, rank, size) for rank in range(size)], "parameters": rows}
    with writing("the optimizer", directory):
        (directory / INDEX).write_text(json.dumps(index))


def read_joined(directory: Path, of: str) -> dict[str, Tensor]:
    """All rows of what the ranks have written, on the CPU; nothing if they have not."""
    parts = [load_file(path) for path in sorted(directory.glob(f"{of}-*-of-*.safetensors"))]
    return {key: torch.cat([part[key] for part in parts]) for key in (parts[0] if parts else ())}


def _name(of: str, rank: int, size: int) -> str:
    """As transformers names the files of a model."""
    return f"{of}-{rank + 1:05d}-of-{size:05d}.safetensors"


State = dict[str, dict[str, Tensor]]
"""Of an optimizer: tensors by parameter and field."""


@dataclass(frozen=True, eq=False)
class SavedRows(Mapping[str, Tensor]):
    """An optimizer's state as `load_state_dict` takes it. To look at a tensor is to read what lies here of it.

    Attributes:
        parts: what each file holds, mapped into memory.
        shapes: of the parameters.
        begins: at which row of each parameter each file begins.
        parameters: the live ones, which these must fit.
    """

    parts: Sequence[State]
    shapes: Mapping[str, tuple[int, ...]]
    begins: Mapping[str, Sequence[int]]
    parameters: Mapping[str, nn.Parameter]
    _read: State = field(default_factory=dict, init=False)  # of the parameter that was looked at last

    @classmethod
    def of(cls, directory: Path, parameters: Mapping[str, nn.Parameter]) -> "SavedRows":
        """What a verified checkpoint has."""
        index = json.loads((directory / INDEX).read_text())
        parts = [_by_name(load_file(directory / name)) for name in index["files"]]
        shapes = {name: tuple(found["shape"]) for name, found in index["parameters"].items()}
        begins = {name: found["begins"] for name, found in index["parameters"].items()}
        return cls(parts, shapes, begins, parameters)

    def __iter__(self) -> Iterator[str]:
        return (f"{name}.{field}" for name, fields in self.parts[0].items() for field in fields)

    def __len__(self) -> int:
        return sum(map(len, self.parts[0].values()))

    def __getitem__(self, key: str) -> Tensor:
        name, _, field = key.rpartition(".")
        if name not in self._read:
            self._read.clear()
            self._read[name] = self._of_parameter(name)
        return self._read[name][field]

    def _of_parameter(self, name: str) -> dict[str, Tensor]:
        parameter, begins = self.parameters[name], [*self.begins[name], self.shapes[name][0]]
        first, last = span_here(parameter)
        # A rank without a row has empty tensors, which any part can give.
        found = [i for i in range(len(self.parts)) if begins[i] < last and begins[i + 1] > first] or [0]
        parts = [self.parts[i][name] for i in found]
        if "kept" in parts[0]:
            units = parameter.numel() // len(parameter) // parts[0]["exp_avg"].shape[1]  # in each row
            return joined([state_between(part, first * units, last * units) for part in parts])
        spans = [(max(first - begins[i], 0), last - begins[i]) for i in found]
        return {
            field: values if not values.dim() else _rows(parameter, [part[field] for part in parts], spans)
            for field, values in parts[0].items()
        }


def _rows(parameter: nn.Parameter, parts: Sequence[Tensor], spans: Sequence[tuple[int, int]]) -> Tensor:
    rows = torch.cat([part[lo:hi] for part, (lo, hi) in zip(parts, spans, strict=True)])
    return lying_as(parameter, rows.to(parameter.device))


def _by_name(state: Mapping[str, Tensor]) -> State:
    found: State = {}
    for key, values in state.items():
        name, _, field = key.rpartition(".")
        found.setdefault(name, {})[field] = values
    return found
