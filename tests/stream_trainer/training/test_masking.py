"""The mask stage in the service: what anchors do to the weights that may move."""

from pathlib import Path

import pytest

from stream_trainer.models.loading import load_model
from stream_trainer.service import make_learner
from stream_trainer.settings.schema import ModelSettings, Settings
from stream_trainer.training.masking import Anchors
from stream_trainer.training.step import train_step
from stream_trainer.training.target import mean_loss
from tests.helpers.service import MODEL, configuration, jsonl
from tests.stream_trainer.training.test_step import make_samples

ANCHORS = make_samples(6, seed=7)


def rises_of_the_anchors_loss(folder: Path, steps: int, **dual_sft: float) -> list[float]:
    """How far the anchors' loss is above its start after each step of training on something else."""
    selection = {"mask": "dual_sft", "dual_sft": {"density": 0.2, "lambda_prior": 0.0, **dual_sft}, "pool_size": 8}
    settings = Settings(**configuration(folder, jsonl(folder / "none.jsonl"), selection=selection))  # type: ignore[arg-type]
    loaded = load_model(settings.model, settings.training.seed)
    anchors = Anchors.of(loaded.model, ANCHORS, settings.selection.dual_sft.lambda_prior)
    learner = make_learner(settings, loaded, make_samples(4, seed=99), anchors)
    start, rises = mean_loss(learner.capture, ANCHORS, learner.pad_id), []
    for seed in range(steps):
        train_step(learner, make_samples(8, seed=seed))
        rises.append(mean_loss(learner.capture, ANCHORS, learner.pad_id) - start)
    return rises


def test_the_answers_guard_the_first_mask_where_self_distillation_cannot(tmp_path: Path) -> None:
    unguarded = rises_of_the_anchors_loss(tmp_path, 1, lambda_answers=0.0)
    distilled = rises_of_the_anchors_loss(tmp_path, 1, lambda_answers=0.0, lambda_prior=4.0)
    guarded = rises_of_the_anchors_loss(tmp_path, 1, lambda_answers=4.0)
    assert distilled == pytest.approx(unguarded)
    assert guarded[0] < unguarded[0]


def test_masks_that_the_answers_guard_keep_the_anchors_loss_down(tmp_path: Path) -> None:
    unguarded = rises_of_the_anchors_loss(tmp_path, 6, lambda_answers=0.0)
    guarded = rises_of_the_anchors_loss(tmp_path, 6, lambda_answers=4.0)
    assert all(ours < theirs for ours, theirs in zip(guarded, unguarded, strict=True))


def test_no_copy_of_the_model_is_kept_where_self_distillation_counts_for_nothing() -> None:
    model = load_model(ModelSettings(config=MODEL, tokenizer="bytes"), 0).model
    base = Anchors.of(model, ANCHORS, lambda_prior=0.2).base
    assert base is not None
    assert base is not model
    assert Anchors.of(model, ANCHORS, lambda_prior=0.0).base is None
