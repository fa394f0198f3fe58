"""What is said of padding: either the gradient is that of the samples without it, or the batch is refused by name."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from gradient_selectors.capture.batch import Batch, check_lengths
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.engine import SelectionEngine
from gradient_selectors.mask.self_distillation import prior_gradient
from gradient_selectors.target import Target, mean_loss
from gradient_selectors.weigh.baselines import Equal
from torch import Tensor

from tests.helpers.oracle import MODELS, dense, make_batch, make_model, relative_error

LENGTHS = (8, 5, 11)
WEIGHTS = torch.tensor([0.3, 0.5, 0.2])
EXACT = 1e-5  # relative, float32

Stated = Batch | Mapping[str, Any]


def mask_of(batch: Batch) -> Tensor:
    positions_T = torch.arange(batch.input_ids_NT.shape[1])
    return (positions_T < torch.tensor(batch.lengths)[:, None]).long()


def on_the_left(values_NT: Tensor, batch: Batch) -> Tensor:
    """Each row with what is behind its sample in front of it."""
    width = values_NT.shape[1]
    return torch.stack([row.roll(width - length) for row, length in zip(values_NT, batch.lengths, strict=True)])


def labels_under_a_mask(batch: Batch) -> Stated:
    mask = mask_of(batch)
    return {
        "input_ids": batch.input_ids_NT.masked_fill(mask == 0, 5),
        "labels": batch.labels_NT.masked_fill(mask == 0, 7),
        "attention_mask": mask,
    }


def labels_beyond_the_lengths(batch: Batch) -> Stated:
    return Batch(batch.input_ids_NT, batch.labels_NT.masked_fill(mask_of(batch) == 0, 7), batch.lengths)


def left_under_a_mask(batch: Batch) -> Stated:
    values = {"input_ids": batch.input_ids_NT, "labels": batch.labels_NT, "attention_mask": mask_of(batch)}
    return {name: on_the_left(value, batch) for name, value in values.items()}


def left_by_the_lengths(batch: Batch) -> Stated:
    return Batch(on_the_left(batch.input_ids_NT, batch), on_the_left(batch.labels_NT, batch), batch.lengths)


WAYS: dict[Callable[[Batch], Stated], str | None] = {
    labels_under_a_mask: None,
    labels_beyond_the_lengths: "sample 0 has a label at position 8, beyond its length of 8 tokens; pad on the right",
    left_under_a_mask: "position 2 of sample 0 is padding before a token; set tokenizer.padding_side='right'",
    left_by_the_lengths: "sample 0 has a label at position 8, beyond its length of 8 tokens; pad on the right",
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("state", WAYS)
def test_padding_is_exact_or_refused(kind: str, state: Callable[[Batch], Stated]) -> None:
    """Whatever lies on the padding, against autograd of each sample by itself."""
    model, batch = make_model(kind), make_batch(LENGTHS)
    capture, oracle = GradientCapture(model), dense(model, batch)
    says = WAYS[state]
    if says is not None:
        with pytest.raises(ValueError, match=says):
            capture.run(Batch.of(state(batch)))
        return
    gradients = capture.run(Batch.of(state(batch)))
    assert relative_error(oracle.flat(gradients.weighted_gradient(WEIGHTS)), oracle.update(WEIGHTS)) < EXACT
    assert relative_error(gradients.losses_N, oracle.losses) < EXACT


def test_every_way_in_refuses_a_label_beyond_a_samples_length() -> None:
    model, batch = make_model("llama"), labels_beyond_the_lengths(make_batch(LENGTHS))
    assert isinstance(batch, Batch)
    capture, optimizer = GradientCapture(model), torch.optim.SGD(model.parameters(), lr=0.1)
    engine = SelectionEngine(model, optimizer, Equal())
    ways: list[Callable[[], object]] = [
        lambda: capture.run(batch),
        lambda: capture.losses(batch),
        lambda: capture.train(batch, WEIGHTS),
        lambda: engine.backward(batch),
        lambda: engine.train(batch),
        lambda: Target.of([batch]),
        lambda: mean_loss(capture, [batch]),
        lambda: prior_gradient(capture, model, [batch]),
    ]
    for way in ways:
        with pytest.raises(ValueError, match="sample 0 has a label at position 8"):
            way()


@pytest.mark.parametrize("lengths", [(3, 3), (3, 9), (3,)])
def test_lengths_that_do_not_fit_are_refused(lengths: tuple[int, ...]) -> None:
    ids = torch.full((2, 4), 5)
    says = (
        "do not fit input_ids of 2 samples by 4 tokens" if lengths != (3, 3) else "sample 0 has a label at position 3"
    )
    with pytest.raises(ValueError, match=says):
        check_lengths(Batch(ids, ids, lengths))


def test_a_gap_in_a_mask_is_refused_where_it_is() -> None:
    ids = torch.full((2, 5), 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]])
    with pytest.raises(ValueError, match="position 2 of sample 1 is padding before a token"):
        Batch.of({"input_ids": ids, "labels": ids, "attention_mask": mask})
