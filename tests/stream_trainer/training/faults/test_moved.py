"""Which tensors moved between two looks."""

import pytest
import torch

from stream_trainer.training.faults.moved import SAMPLED, Moved


def test_it_is_not_known_before_the_second_look() -> None:
    assert Moved({"a": torch.ones(2)}).look() is None


def test_one_weight_of_a_large_tensor_is_enough_to_have_moved() -> None:
    """As in a peer, where 2 of 192 adapters got gradients for days."""
    tensors = {f"adapter.{i}": torch.ones(50, 1000) for i in range(8)}
    moved = Moved(tensors)
    moved.look()
    tensors["adapter.3"][49, 998] = 1 + 2**-23
    found = moved.look()
    assert found is not None
    assert found.tensors == pytest.approx(1 / 8)
    assert found.weights == 0, "of so few none is among those looked at"
    assert found.still == tuple(f"adapter.{i}" for i in range(8) if i != 3)
    again = moved.look()
    assert again is not None
    assert again.tensors == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_count_by_their_number(dtype: torch.dtype) -> None:
    tensors = {"large": torch.zeros(30 * SAMPLED, dtype=dtype), "small": torch.zeros(10 * SAMPLED, dtype=dtype)}
    moved = Moved(tensors)
    moved.look()
    tensors["large"].add_(1)
    found = moved.look()
    assert found is not None
    assert found.tensors == 0.5
    assert found.weights == pytest.approx(0.75)
    tensors["small"][: 5 * SAMPLED].add_(1)
    half = moved.look()
    assert half is not None
    assert half.weights == pytest.approx(0.125, abs=0.01)


def test_looking_changes_nothing_and_a_transposed_parameter_can_be_looked_at() -> None:
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    moved = Moved({"a": parameter.T})
    moved.look()
    assert parameter.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert moved.look() is not None
