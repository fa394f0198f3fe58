"""How a pool is cut, and sums of gradients that keep nothing."""

from itertools import pairwise

import pytest
import torch
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.pieces import add_weighted_gradient, pieces_of

from tests.helpers.oracle import dense, make_batch, make_model, relative_error

LENGTHS = (9, 2, 30, 8, 3, 8)


@pytest.mark.parametrize("micro_tokens", [1, 8, 16, 17, 27, 1000])
def test_every_sample_is_in_one_piece_with_those_of_like_length(micro_tokens: int) -> None:
    pieces = pieces_of(LENGTHS, micro_tokens)
    assert sorted(sample for piece in pieces for sample in piece) == list(range(6))
    for piece in pieces:
        assert len(piece) == 1 or len(piece) * max(LENGTHS[i] for i in piece) <= micro_tokens
    for shorter, longer in pairwise(pieces):
        assert max(LENGTHS[i] for i in shorter) <= min(LENGTHS[i] for i in longer)


def test_padding_ends_a_piece_but_not_for_a_few_tokens() -> None:
    assert pieces_of([100, 400, 410, 110], 10_000) == [(0, 3), (1, 2)]
    assert pieces_of([10, 40, 41, 11], 10_000) == [(0, 1, 2, 3)]


def test_without_a_limit_all_are_one_piece_in_their_order() -> None:
    assert pieces_of(LENGTHS, None) == [(0, 1, 2, 3, 4, 5)]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2_tied", "lora", "checkpointing", "gemma2_capped"])
@pytest.mark.parametrize("micro_tokens", [None, 12])
def test_sums_are_autograds(kind: str, micro_tokens: int | None) -> None:
    model, batch = make_model(kind), make_batch((9, 5, 12, 8))
    oracle, capture = dense(model, batch), GradientCapture(model)
    weights_N = torch.tensor([0.5, 0.0, 0.2, 0.3])
    total: dict[str, torch.Tensor] = {}
    for piece in 2 * pieces_of(batch.lengths, micro_tokens):
        add_weighted_gradient(total, capture, batch.among(piece), weights_N[list(piece)])
    assert relative_error(oracle.flat(total), 2 * oracle.update(weights_N)) < 1e-5
