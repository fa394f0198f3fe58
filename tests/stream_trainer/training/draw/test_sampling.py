"""From settings to the options of draws: nothing that can be asked for is lost on the way."""

from typing import Any, get_args

import pytest
from gradient_selectors.features.columns import SIMPLE, Columns

from stream_trainer.settings.sections.selection import FeatureName, LearnedSettings, SelectionSettings
from stream_trainer.training.draw.sampling import columns_of, learned_options


def columns(**given: Any) -> Columns:
    return columns_of(LearnedSettings.model_validate(given), num_own=0)


def test_every_feature_by_default() -> None:
    assert columns() == Columns()


@pytest.mark.parametrize("name", get_args(FeatureName))
def test_a_feature_alone_has_its_columns_and_no_others(name: str) -> None:
    found = columns(features=[name])
    assert found.simple == ((name,) if name in SIMPLE else ())
    assert (found.components > 0) == (name == "components")
    assert (found.values > 0) == (name == "fields")


def test_features_of_a_record_need_fields() -> None:
    assert columns(fields=[]).values == 0


def test_a_users_own_features_have_a_column_each() -> None:
    settings = LearnedSettings.model_validate({"features": ["length", "package.module:function"]})
    found = columns_of(settings, num_own=2)
    assert found == Columns(("length",), 0, 0, ("package.module:function 0", "package.module:function 1"))


@pytest.mark.parametrize(("mask", "first_probe"), [("none", 5), ("dual_sft", 0)])
def test_a_mask_cannot_wait_for_the_first_probe(mask: str, first_probe: int) -> None:
    selection = SelectionSettings.model_validate({"mask": mask, "learned": {"probe_every": 5}})
    options = learned_options(selection)
    assert (options.first_probe, options.probe_every) == (first_probe, 5)
    assert (options.batch_size, options.probe_size) == (selection.batch_size, selection.pool_size)
