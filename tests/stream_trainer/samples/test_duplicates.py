"""The same record twice is told from another one, across restarts too."""

import json
from typing import Any

import pytest

from stream_trainer.records import Partition, Sample
from stream_trainer.samples.duplicates import Duplicates
from stream_trainer.settings.schema import SampleSettings


def sample(
    offset: int, id: str | None = None, ids: tuple[int, ...] = (1, 2), labels: tuple[int, ...] = (1, 2)
) -> Sample:
    return Sample(ids, labels, Partition("log", 0), offset, size=1, id=id)


def window(by: Any, size: int = 3) -> Duplicates:
    return Duplicates(SampleSettings(duplicates=by, duplicate_window=size))


def test_the_same_id_is_a_duplicate_within_the_window() -> None:
    met = window("id")
    assert [met.is_one(sample(n, id)) for n, id in enumerate(["a", "b", "a", None, None])] == [0, 0, 1, 0, 0]
    assert [met.is_one(sample(10 + n, id)) for n, id in enumerate(["c", "d", "a"])] == [0, 0, 0], "a is forgotten"


def test_the_same_tokens_are_a_duplicate_and_other_labels_are_none() -> None:
    met = window("content")
    assert not met.is_one(sample(0, "a"))
    assert met.is_one(sample(1, "b"))
    assert not met.is_one(sample(2, "a", labels=(-100, 2)))


def test_without_the_setting_nothing_is_one() -> None:
    met = window("keep")
    assert not met.is_one(sample(0, "a"))
    assert not met.is_one(sample(1, "a"))


@pytest.mark.parametrize("by", ["id", "content"])
def test_a_restart_knows_what_was_met_and_takes_no_record_for_its_own_duplicate(by: Any) -> None:
    before, after = window(by), window(by)
    assert not before.is_one(sample(5, "a"))
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert not after.is_one(sample(5, "a")), "the same record, read again"
    assert after.is_one(sample(6, "a"))
