"""Copies of a run: files written of one, however late, are those of the moment at which it was taken."""

import importlib.util
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_selectors import MaskedAdamW

from stream_trainer.checkpoints.background import Copied, Copies, in_background
from stream_trainer.checkpoints.checkpoint import NamedOptimizer, TrainerState, save_checkpoint
from stream_trainer.models.loading import LoadedModel, load_model
from stream_trainer.models.saving import save_model
from stream_trainer.settings.schema import ModelSettings
from stream_trainer.training.optimizer import NamedAdamW
from tests.helpers.service import hashes
from tests.helpers.tiny_models import CONFIGS, INPUT, settings_of, shake

LORA = {"rank": 2}


def masked(loaded: LoadedModel) -> MaskedAdamW:
    trained = [(name, p) for name, p in loaded.model.named_parameters() if p.requires_grad]
    return MaskedAdamW(trained, lr=0.01)


def plain(loaded: LoadedModel) -> Any:
    trained = [(name, p) for name, p in loaded.model.named_parameters() if p.requires_grad]
    return NamedAdamW([{"params": trained}], lr=0.01)


def train(loaded: LoadedModel, optimizer: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(optimizer, MaskedAdamW):  # with a mask of another size, which moves the moments
        masks = {n: torch.rand(p.shape, generator=generator) < 0.1 * seed for n, p in optimizer.parameters.items()}
        optimizer.replace_mask(masks)
    tokens = torch.randint(256, INPUT.shape, generator=generator)
    loaded.model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def state_at(step: int, gradient: torch.Tensor, seen: list[int]) -> TrainerState:
    parts = {"engine": {"target": {"gradient": {"a.weight": gradient.T}, "seen": seen}}, "sampler": {"count": step}}
    return TrainerState(step, {"events:0": {"next": 17}}, {"topic_id": "abc"}, "1.2.3", parts)


def require_copies_last(loaded: LoadedModel, optimizer: NamedOptimizer, copies: Copies, folder: Path) -> None:
    """Write what is there after each of some steps, at once, and once more of its copy after the step behind it."""
    gradient, seen = torch.arange(6.0).reshape(2, 3), list[int]()
    for step in (1, 2, 3):
        train(loaded, optimizer, step)
        gradient += 1
        seen.append(step)
        state = state_at(step, gradient, seen)
        at_once = save_checkpoint(folder / "at once", loaded, optimizer, state, keep=2)
        copied: Copied = copies.take(loaded, optimizer, state)
        train(loaded, optimizer, step + 1)
        gradient += 1
        seen.append(0)
        late = save_checkpoint(folder / "late", copied.loaded, copied, copied.state, keep=2, checked=True)
        assert hashes(late.path) == hashes(at_once.path), step
        assert late.path.name == at_once.path.name


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_files_of_a_copy_are_those_of_its_moment(kind: str, lora: dict[str, int] | None, tmp_path: Path) -> None:
    settings = settings_of(kind).model_dump() | {"lora": lora}
    loaded = load_model(ModelSettings.model_validate(settings), 1)
    require_copies_last(loaded, plain(loaded), Copies(loaded), tmp_path)


def test_so_are_those_of_moments_that_come_and_go_with_a_mask(tmp_path: Path) -> None:
    loaded = load_model(settings_of("llama"), 1)
    require_copies_last(loaded, masked(loaded), Copies(loaded), tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("base", ["bfloat16", "nf4"])
def test_so_are_those_of_adapters_on_a_base_in_fewer_bits(base: str, tmp_path: Path) -> None:
    source = load_model(settings_of("llama"), seed=1)
    shake(source.model)
    save_model(source, tmp_path / "whole")
    settings = {"name": str(tmp_path / "whole"), "dtype": "bfloat16", "lora": {"rank": 2, "base": base}}
    loaded = load_model(ModelSettings.model_validate(settings), 1)
    require_copies_last(loaded, plain(loaded), Copies(loaded), tmp_path)


def test_what_is_frozen_is_not_copied() -> None:
    loaded = load_model(ModelSettings.model_validate(settings_of("llama").model_dump() | {"lora": LORA}), 1)
    optimizer = plain(loaded)
    copied = Copies(loaded).take(loaded, optimizer, state_at(0, torch.ones(2, 3), []))
    for name, parameter in loaded.model.named_parameters():
        other = copied.loaded.model.get_parameter(name)
        assert (other.data_ptr() == parameter.data_ptr()) is not parameter.requires_grad, name


def test_work_in_the_background_returns_or_raises_to_whoever_asks() -> None:
    assert in_background(threading.current_thread).result() is not threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 // 0).result()
