"""Selection under transformers' own Trainer, unchanged, and under TRL's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_selectors import Equal, FilterThenWeight, Gast, MaskRule, Sketched
from gradient_selectors.examples import tiny_batch, tiny_model
from gradient_selectors.integrations.transformers import SelectionMixin
from gradient_selectors.mask.dual_sft import DualSft
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

POOL = 8


class SelectingTrainer(SelectionMixin, Trainer):  # type: ignore[misc]
    """What the documentation tells a user to write."""


def dataset(count: int) -> list[dict[str, Tensor]]:
    batch = tiny_batch(count, seed=3)
    return [{"input_ids": ids, "labels": ids} for ids in batch["input_ids"]]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=POOL,
        num_train_epochs=1,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        **{"save_strategy": "no", **options},
    )


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_equal_coefficients_are_the_trainers_own_step(tmp_path: Path) -> None:
    """All candidates alike: the same parameters as under the Trainer by itself."""
    plain, selecting = tiny_model(), tiny_model()
    Trainer(plain, arguments(tmp_path), train_dataset=dataset(4 * POOL)).train()
    trainer = SelectingTrainer(selecting, arguments(tmp_path), train_dataset=dataset(4 * POOL), selector=Equal())
    trainer.train()
    for name, parameter in selecting.named_parameters():
        torch.testing.assert_close(parameter, plain.get_parameter(name), rtol=0, atol=2e-4)


def test_a_batch_of_the_loader_is_the_pool(tmp_path: Path) -> None:
    model = tiny_model()
    trainer = SelectingTrainer(
        model,
        arguments(tmp_path),
        train_dataset=dataset(2 * POOL),
        selector=FilterThenWeight(batch_size=2),
        target=[tiny_batch(seed=1)],
    )
    before = parameters(model)
    trainer.train()
    assert trainer.engine is not None
    assert trainer.engine.losses_N.shape == (POOL,)
    assert any(not torch.equal(before[name], values) for name, values in parameters(model).items())


def everything_on(folder: Path, model: nn.Module, **options: Any) -> SelectingTrainer:
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    return SelectingTrainer(
        model,
        arguments(folder, save_strategy="steps", save_steps=3, lr_scheduler_type="constant", **options),
        train_dataset=dataset(6 * POOL),
        selector=FilterThenWeight(batch_size=4),
        target=[tiny_batch(seed=1)],
        scoring=Sketched(4, generators[0]),
        route=Gast(2, generators[1]),
    )


def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path: Path) -> None:
    whole, resumed = tiny_model(), tiny_model()
    everything_on(tmp_path / "whole", whole).train()
    everything_on(tmp_path / "stopped", tiny_model(), max_steps=3).train()
    checkpoint = tmp_path / "stopped" / "checkpoint-3"
    assert (checkpoint / "selection.safetensors").exists()
    everything_on(tmp_path / "stopped", resumed).train(resume_from_checkpoint=str(checkpoint))
    for name, values in parameters(whole).items():
        assert torch.equal(values, resumed.get_parameter(name)), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2 .* set it to 1"),
        ({"fp16": True}, "fp16=True .* set bf16=True or neither"),
    ],
)
def test_settings_that_would_change_what_a_step_is_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SelectingTrainer(tiny_model(), arguments(tmp_path, **options), train_dataset=dataset(POOL), selector=Equal())


def test_a_mask_needs_its_optimizer(tmp_path: Path) -> None:
    trainer = SelectingTrainer(
        tiny_model(),
        arguments(tmp_path),
        train_dataset=dataset(POOL),
        selector=Equal(),
        target=[tiny_batch(seed=1)],
        mask=DualSft(MaskRule(0.5)),
    )
    with pytest.raises(ValueError, match="a mask needs the optimizer MaskedAdamW, not AdamW"):
        trainer.train()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")  # TRL's own
def test_it_selects_under_trls_trainer(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="the extra trl is not installed")
    datasets = pytest.importorskip("datasets")
    from stream_trainer.samples.byte_tokenizer import byte_tokenizer

    class SelectingSft(SelectionMixin, trl.SFTTrainer):  # type: ignore[name-defined,misc]
        """The same mixin, before another trainer."""

    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = tiny_model()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # type: ignore[operator]
    rows = [{"prompt": f"count {i} ", "completion": f"{i + 1}"} for i in range(2 * POOL)]
    config = trl.SFTConfig(
        str(tmp_path),
        per_device_train_batch_size=POOL,
        num_train_epochs=1,
        max_length=24,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    ids = torch.tensor(tokenizer("count 1 2")["input_ids"])[None]
    trainer = SelectingSft(
        model,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        selector=FilterThenWeight(batch_size=2),
        target=[{"input_ids": ids, "labels": ids}],
    )
    trainer.train()
    assert trainer.engine is not None
    assert trainer.engine.losses_N.shape == (POOL,)
