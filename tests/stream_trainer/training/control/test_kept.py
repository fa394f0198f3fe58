"""The file of a topic: what is in use stays until something better is proven."""

from pathlib import Path

import pytest

from stream_trainer.errors import SettingsError
from stream_trainer.training.control.kept import KeptTarget

ONE, TWO = {b"b": b'{"text": "two"}', b"a": b'{"text":\n "one"}'}, {b"a": b'{"text": "three"}'}
LINES = b'{"text": "one"}\n{"text": "two"}\n'


def fine(path: Path) -> None:
    assert path.read_bytes()


def refuses(path: Path) -> None:
    raise SettingsError(f"{path} is wrong")


@pytest.fixture
def kept(tmp_path: Path) -> KeptTarget:
    found = KeptTarget(tmp_path / "new" / "target.jsonl", "goals")
    found.take(ONE)
    found.begin(fine)
    return found


def test_the_first_set_is_in_use_at_once_in_the_order_of_its_keys(kept: KeptTarget) -> None:
    assert kept.path.read_bytes() == LINES
    assert not kept.changed
    kept.take(dict(reversed(ONE.items())))
    assert (kept.changed, kept.candidate.exists()) == (False, False)


def test_a_first_set_that_is_wrong_leaves_nothing_that_a_later_one_would_have_to_go_with(tmp_path: Path) -> None:
    found = KeptTarget(tmp_path / "target.jsonl", "goals")
    found.take(ONE)
    with pytest.raises(SettingsError, match="is wrong"):
        found.begin(refuses)
    assert not found.exists
    again = KeptTarget(tmp_path / "target.jsonl", "goals")
    again.take(TWO)
    again.begin(fine)
    assert again.path.read_bytes() == b'{"text": "three"}\n'


def test_another_set_waits_beside_it_until_it_is_accepted(kept: KeptTarget) -> None:
    seen = []
    for settles in (True, False):
        kept.take(TWO)
        seen.append(kept.changed)
        assert kept.path.read_bytes() == LINES
        if settles:
            kept.settle()
    assert seen == [True, False], "it is tried once"
    kept.accept()
    assert kept.path.read_bytes() == b'{"text": "three"}\n'
    assert not kept.candidate.exists()


def test_a_set_that_goes_back_to_what_is_in_use_is_no_news(kept: KeptTarget) -> None:
    kept.take(TWO)
    kept.take(ONE)
    assert (kept.changed, kept.candidate.exists()) == (False, False)


def test_after_a_restart_what_waits_is_tried(kept: KeptTarget) -> None:
    kept.take(TWO)
    again = KeptTarget(kept.path, "goals")
    assert again.exists
    again.begin(refuses)
    assert again.changed


def test_a_value_that_is_no_json_stays_one_line(kept: KeptTarget) -> None:
    kept.take({b"a": b"gar\nbage\x00"})
    assert kept.candidate.read_bytes() == b"gar bage\x00\n"


@pytest.mark.parametrize("topic", [None, "another"])
def test_a_file_of_something_else_is_never_overwritten(topic: str | None, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(LINES)
    if topic is not None:
        (tmp_path / "mine.jsonl.topic").write_text(topic)
    with pytest.raises(SettingsError, match=r"target\.path=.*mine\.jsonl is not of target\.topic=goals"):
        KeptTarget(path, "goals")
