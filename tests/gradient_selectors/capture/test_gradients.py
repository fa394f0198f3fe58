"""Products of written-out gradients, whose sums run over millions of weights: right whatever the kernel's rounding."""

import numpy as np
import pytest
import torch
from gradient_selectors.capture.gradients import SMALL_ELEMENTS, _products
from torch import Tensor

from tests.helpers.oracle import relative_error


def rows(count: int, length: int) -> Tensor:
    return torch.randn(count, length, generator=torch.Generator().manual_seed(0)) + 0.3


def one_after_the_other(left: Tensor, right: Tensor) -> Tensor:
    """A float32 product as by the plainest kernel: a single sum, which takes in one term after the other."""
    terms = (left.unsqueeze(-2) * right.mT.unsqueeze(-3)).numpy()
    sums = np.add.accumulate(terms, axis=-1, dtype=np.float32)[..., -1:]
    return torch.from_numpy(sums.sum(-1))  # of one number, or of none where there was none to add


def test_products_of_short_rows_are_those_of_float64() -> None:
    short = rows(8, SMALL_ELEMENTS // 8)
    found = _products(short)
    assert found.dtype == torch.float64
    assert relative_error(found, short.double() @ short.double().T) < 1e-13


@pytest.mark.parametrize("length", [400_003, 409_600])
def test_products_of_long_rows_are_right_to_rounding(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where plain products are off by 1e-4 and more; with an end that fills no block, and without."""
    long = rows(4, length)
    exact = long.double() @ long.double().T
    assert relative_error(_products(long), exact) < 1e-5
    monkeypatch.setattr(Tensor, "__matmul__", one_after_the_other)
    assert relative_error(_products(long), exact) < 1e-6
    assert relative_error(long @ long.T, exact) > 1e-4


@pytest.mark.parametrize("length", [100, 400_003])
def test_a_product_that_float32_cannot_hold_is_infinite(length: int) -> None:
    """So that a gradient of such a length is known to be broken, however few its weights are."""
    both = rows(2, length)
    both[0] *= 1e25
    found = _products(both)
    assert torch.isfinite(found).tolist() == [[False, True], [True, True]]
    assert found[0, 0] == torch.inf
