"""A part of a model that mixes the samples of a batch, or draws at random, is found and named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradient_selectors import UnsupportedParameterError
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.places import EntangledSamplesError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig

from stream_trainer.models.loading import load_model
from stream_trainer.settings.schema import ModelSettings
from tests.families.configurations import BY_TITLE
from tests.helpers.oracle import make_batch, make_model
from tests.helpers.tiny_models import shake


class Then(nn.Module):
    """A layer, and something with what comes out of it."""

    def __init__(self, inner: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.inner(x))


def over_the_batch(x: Tensor) -> Tensor:
    return x - x.mean(0, keepdim=True)


def over_padding(x: Tensor) -> Tensor:
    return x * x.shape[1]


def with_capacity(x: Tensor) -> Tensor:
    """What comes after the first eight tokens of a batch is dropped, as experts do that are full."""
    flat = x.flatten(0, 1)
    return torch.cat([flat[:8], torch.zeros_like(flat[8:])]).view_as(x)


def noisy(x: Tensor) -> Tensor:
    return x * torch.empty_like(x).uniform_(0.9, 1.1)


@pytest.mark.parametrize("change", [over_the_batch, over_padding, with_capacity, noisy])
@pytest.mark.parametrize("kind", ["llama", "lora"])
def test_a_part_that_mixes_samples_or_draws_is_named(kind: str, change: Callable[[Tensor], Tensor]) -> None:
    model: Any = make_model(kind)
    model.model.layers[1].mlp = Then(model.model.layers[1].mlp, change)
    says = "differently each time" if change is noisy else "differently beside others than alone"
    with pytest.raises(EntangledSamplesError, match=rf"^model\.layers\.1\.mlp \(a Then\) .*{says}"):
        GradientCapture(model)
    assert issubclass(EntangledSamplesError, UnsupportedParameterError)  # what callers catch


def test_noise_of_a_router_is_found_by_the_library_and_left_out_by_the_trainer() -> None:
    config = BY_TITLE["Mixtral"].config
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MixtralConfig(**config)).train()
    with pytest.raises(EntangledSamplesError, match=r"^model\.layers\.0\.mlp \(a MixtralSparseMoeBlock\) "):
        GradientCapture(model)
    loaded = load_model(ModelSettings(config=config, tokenizer="bytes"), seed=0)
    GradientCapture(loaded.model)
    assert loaded.config.router_jitter_noise == 0.1  # as it is saved


@pytest.mark.parametrize("title", ["Phi 3 with LongRoPE", "Llama with dynamic scaling"])
def test_what_was_computed_before_makes_no_difference(title: str) -> None:
    """Dynamic scaling remembers the longest text so far."""
    model = load_model(ModelSettings(config=BY_TITLE[title].config, tokenizer="bytes"), seed=0).model
    shake(model)
    capture, short = GradientCapture(model), make_batch((9, 5))
    before = capture.losses(short)
    capture.losses(make_batch((31, 7)))
    assert torch.equal(capture.losses(short), before)
    both = capture.losses(make_batch((31, 9)))
    torch.testing.assert_close(both[1:], capture.losses(make_batch((31, 9)).among([1])))
