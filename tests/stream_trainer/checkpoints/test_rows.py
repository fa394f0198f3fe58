"""What two ranks write of an optimizer is read back to the bit on any number of ranks, and each reads its own rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gradient_selectors import MaskedAdamW
from gradient_selectors.capture.shards import own_rows
from gradient_selectors.world.base import Alone
from gradient_selectors.world.deal import spans_of
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from stream_trainer.checkpoints.rows import SavedRows, own_tensors, write_index, write_own
from stream_trainer.training.optimizer import NamedAdamW

# Rows that do not divide by the ranks, and fewer rows than ranks.
SHAPES = {"matrix": (7, 4), "vector": (5,), "row": (1, 6)}
MOMENTS = ("exp_avg", "exp_avg_sq")


class Rank(Alone):
    """One of several, which hears nothing of the others."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


@contextmanager
def mesh_of(rank: int, size: int) -> Iterator[DeviceMesh]:
    """Where tensors lie in rows as on one rank of several; nothing can be exchanged."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (size,))
    finally:
        dist.destroy_process_group()


Make = Callable[[dict[str, nn.Parameter], Alone], Any]


def adamw(parameters: dict[str, nn.Parameter], world: Alone) -> NamedAdamW:
    return NamedAdamW([{"params": list(parameters.items())}], lr=0.1, fused=True)


def masked_weights(parameters: dict[str, nn.Parameter], world: Alone) -> MaskedAdamW:
    return MaskedAdamW(parameters.items(), lr=0.1, world=world)


def masked_rows(parameters: dict[str, nn.Parameter], world: Alone) -> MaskedAdamW:
    return MaskedAdamW(parameters.items(), lr=0.1, world=world, granularity="row")


OPTIMIZERS = [adamw, masked_weights, masked_rows]


def whole() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def in_rows(mesh: DeviceMesh) -> dict[str, nn.Parameter]:
    found = {}
    for name, parameter in whole().items():
        lo, hi = spans_of(mesh.size(), len(parameter))[mesh.get_local_rank()]
        shape, stride = parameter.shape, parameter.stride()
        rows = DTensor.from_local(parameter.data[lo:hi], mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        found[name] = nn.Parameter(rows)
    return found


def trained(make: Make) -> dict[str, Tensor]:
    """The state of one process's optimizer after some steps, in which masked units join at different ones."""
    parameters, generator = whole(), torch.Generator().manual_seed(2)
    optimizer = make(parameters, Alone())
    for _ in range(3):
        if isinstance(optimizer, MaskedAdamW):
            by_row = optimizer.granularity == "row"
            optimizer.replace_mask({name: mask_of(p, generator, by_row=by_row) for name, p in parameters.items()})
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return {key: values.clone() for key, values in optimizer.state_dict().items()}


def mask_of(parameter: Tensor, generator: torch.Generator, *, by_row: bool) -> Tensor:
    if by_row and parameter.ndim > 1:
        return (torch.rand(len(parameter), 1, generator=generator) < 0.6).expand(parameter.shape)
    return torch.rand(parameter.shape, generator=generator) < 0.6


def write(directory: Path, make: Make, state: dict[str, Tensor], size: int = 2) -> None:
    """As so many ranks do, of which each has its own of a whole state."""
    for rank in range(size):
        with mesh_of(rank, size) as mesh:
            optimizer = make(in_rows(mesh), Rank(rank, size))
            optimizer.load_state_dict(state)
            assert set(write_own(directory, "optimizer", optimizer.state_dict(), rank, size)) == {
                path(directory, rank, size).name
            }
            write_index(directory, optimizer.parameters, size)


def path(directory: Path, rank: int, size: int = 2) -> Path:
    return directory / f"optimizer-{rank + 1:05d}-of-{size:05d}.safetensors"


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        assert found[key].dtype is values.dtype
        assert torch.equal(found[key], values), key


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_one_process_has_what_all_ranks_had(make: Make, tmp_path: Path) -> None:
    state = trained(make)
    write(tmp_path, make, state)
    optimizer = make(whole(), Alone())
    optimizer.load_state_dict(SavedRows.of(tmp_path, optimizer.parameters))
    assert_equal(optimizer.state_dict(), state)
    for file in tmp_path.iterdir():  # which goes, in time
        file.write_bytes(bytes(file.stat().st_size))
    assert_equal(optimizer.state_dict(), state)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_other_ranks_have_what_they_had_of_the_whole(make: Make, size: int, tmp_path: Path) -> None:
    state = trained(make)
    write(tmp_path, make, state)
    for rank in range(size):
        with mesh_of(rank, size) as mesh:
            found, wanted = (make(in_rows(mesh), Rank(rank, size)) for _ in range(2))
            found.load_state_dict(SavedRows.of(tmp_path, found.parameters))
            wanted.load_state_dict(state)
            ours, theirs = own_tensors(found.state_dict()), own_tensors(wanted.state_dict())
            assert_equal(ours, theirs)
            if make is adamw:
                for name, shape in SHAPES.items():
                    lo, hi = spans_of(size, shape[0])[rank]
                    for moment in MOMENTS:
                        assert torch.equal(ours[f"{name}.{moment}"], state[f"{name}.{moment}"][lo:hi])


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_no_file_holds_more_than_the_rows_of_its_rank(make: Make, tmp_path: Path) -> None:
    state = trained(make)
    write(tmp_path, make, state)
    found = [load_file(path(tmp_path, rank)) for rank in range(2)]
    for name, shape in SHAPES.items():
        counts = [len(part[f"{name}.exp_avg"]) for part in found]
        assert sum(counts) == len(state[f"{name}.exp_avg"])
        if make is adamw:
            assert counts == [hi - lo for lo, hi in spans_of(2, shape[0])]
        else:
            per_row = shape[1] if make is masked_weights and len(shape) > 1 else 1
            for part, (lo, hi) in zip(found, spans_of(2, shape[0]), strict=True):
                rows = part[f"{name}.kept"] // per_row
                assert bool(((rows >= lo) & (rows < hi)).all())


def test_only_what_is_looked_at_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, adamw, trained(adamw))
    with mesh_of(1, 2) as mesh:
        saved = SavedRows.of(tmp_path, in_rows(mesh))
        first, second = saved.parts
        for tensors in first.values():
            monkeypatch.setitem(tensors, "exp_avg", "not to be read")  # the other rank's
        assert torch.equal(own_rows(saved["matrix.exp_avg"]), second["matrix"]["exp_avg"])


def test_another_optimizer_says_what_does_not_fit(tmp_path: Path) -> None:
    write(tmp_path, adamw, trained(adamw))
    masked = masked_weights(whole(), Alone())
    with pytest.raises(ValueError, match="made without a mask"):
        masked.load_state_dict(SavedRows.of(tmp_path, masked.parameters))
    write(tmp_path, masked_weights, trained(masked_weights))
    plain = adamw(whole(), Alone())
    with pytest.raises(ValueError, match="made with a mask"):
        plain.load_state_dict(SavedRows.of(tmp_path, plain.parameters))
