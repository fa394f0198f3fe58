"""Features of a user's own, through the whole service: what they fail on is given away; if that is all, it stops."""

import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from stream_trainer.errors import TrainingError
from stream_trainer.ingest.letter import read_dead_letters
from stream_trainer.service import serve
from stream_trainer.settings.schema import Settings
from stream_trainer.training.faults.own_features import MAX_FAILED_IN_A_ROW
from stream_trainer.training.watchers import Watcher
from tests.helpers.service import (
    ALL_ON,
    checkpoints,
    configuration,
    counts,
    get,
    good,
    goods,
    hashes,
    jsonl,
    metrics,
    on_free_port,
    run_main,
    serve_until,
    write_lines,
)

# What a user writes: it fails on a token, in a way of its own.
FILE = """
import numpy as np

BAD = ord("~")


def numbers(samples):
    return np.array([[len(s.input_ids), s.input_ids.count(ord("r"))] for s in samples], dtype=float)


def raises(samples):
    if any(BAD in s.input_ids for s in samples):
        raise ZeroDivisionError("no tilde, please" + chr(10) + "and no second line")
    return numbers(samples)


def not_finite(samples):
    found = numbers(samples)
    found[[BAD in s.input_ids for s in samples], 1] = np.nan
    return found


def wider(samples):
    return np.ones((len(samples), 3 if any(BAD in s.input_ids for s in samples) else 2))


def fewer(samples):
    return numbers([s for s in samples if BAD not in s.input_ids])


def always(samples):
    raise OSError("the dictionary is gone")


def one_number(samples):
    return 1.0


def together(samples):
    if len(samples) > 1 and any(BAD in s.input_ids for s in samples):
        raise MemoryError("one at a time")
    return numbers(samples)
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`own_features_of_a_user`, which Python finds but nothing knows of."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "own_features_of_a_user.py").write_text(FILE)
    (tmp_path / "plugins" / "own_features_that_break.py").write_text("raise KeyError('x\\ny')")
    monkeypatch.syspath_prepend(tmp_path / "plugins")
    for name in ("own_features_of_a_user", "own_features_that_break"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def poisoned(number: int) -> bytes:
    return json.dumps({"id": number, "text": f"{number} ~ stone"}).encode()


def config_of(folder: Path, name: str, bad: range = range(0), records: int = 96) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    values = [poisoned(number) if number in bad else good(number) for number in range(records)]
    write_lines(folder / "samples.jsonl", values)
    name = name if ":" in name else f"own_features_of_a_user:{name}"
    learned = {"features": ["likeness", name], "probe_every": 2}
    selection = ALL_ON | {"draw": "learned", "route": "none", "mask": "none", "learned": learned}
    return configuration(folder, jsonl(folder / "samples.jsonl"), selection=selection)


@pytest.mark.parametrize("name", ["raises", "not_finite", "wider", "fewer"])
def test_a_record_that_they_fail_on_is_a_dead_letter(name: str, tmp_path: Path) -> None:
    bad = range(3, 80, 7)
    config = on_free_port(config_of(tmp_path / "run", name, bad))
    shown: list[tuple[float, str]] = []

    def on_step(*_: object) -> None:
        health = json.loads(get(config, "/healthz")[1])
        assert health["ok"]
        shown.append((metrics(config)['dead_letters_total{reason="feature_failed"}'], health["detail"]))

    summary = serve(Settings(**config), threading.Event(), Watcher(on_step))
    letters = list(read_dead_letters(tmp_path / "run" / "dead-letters.jsonl"))
    assert [letter.record.value for letter in letters] == [poisoned(number) for number in bad]
    assert {letter.reason for letter in letters} == {"feature_failed"}
    assert all(letter.detail and "\n" not in letter.detail for letter in letters)
    assert summary.counts["dead_lettered"] == len(bad)
    assert sum(summary.counts.values()) == 96
    assert shown[-1][0] == len(bad)
    assert "is dead-lettered as feature_failed: " in shown[-1][1]


@pytest.mark.parametrize(
    ("name", "bad", "says"),
    [
        ("raises", range(40, 90), f"failed on {MAX_FAILED_IN_A_ROW} records in a row (ZeroDivisionError: no tilde,"),
        ("together", range(40, 41), "failed on records together, each of which it takes by itself (MemoryError: one"),
    ],
)
def test_failing_on_many_in_a_row_ends_the_run_with_what_was_learned(
    name: str, bad: range, says: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(tmp_path / "run", name, bad)
    with pytest.raises(TrainingError) as raised:
        serve_until(config)
    assert raised.value.exit_code == 7
    assert str(raised.value).startswith(f"selection.learned.features=own_features_of_a_user:{name} {says}")
    assert str(raised.value).endswith("; correct it and start again")
    assert "\n" not in str(raised.value)
    assert caplog.text.count("Traceback") == 1
    learned = counts(config)
    assert learned["trained"] > 0
    assert learned["dead_lettered"] < MAX_FAILED_IN_A_ROW
    mended = config_of(tmp_path / "run", "numbers", bad)
    summary, _ = serve_until(mended)
    assert sum(summary.counts.values()) == 96
    assert summary.counts["dead_lettered"] == learned["dead_lettered"]


def test_a_stream_of_nothing_else_ends(tmp_path: Path) -> None:
    summary, steps = serve_until(config_of(tmp_path / "run", "raises", range(20), records=20))
    assert summary.counts["dead_lettered"] == 20
    assert steps == []


def test_a_resumed_run_gives_the_same_ones_away(tmp_path: Path) -> None:
    whole, resumed = (config_of(tmp_path / name, "raises", range(3, 80, 7)) for name in ("whole", "resumed"))
    resumed["source"] = whole["source"]
    _, expected = serve_until(whole)
    assert [step for last in (2, 5, None) for step in serve_until(resumed, last)[1]] == expected
    assert hashes(checkpoints(resumed)[-1])["state.safetensors"] == hashes(checkpoints(whole)[-1])["state.safetensors"]
    assert counts(resumed) == counts(whole)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("always", "your own features cannot be used (OSError: the dictionary is gone); return an array of finite"),
        ("one_number", "your own features cannot be used (TypeError: "),
        ("not_there", "cannot be imported (AttributeError: "),
        ("own_features_that_break:x", "cannot be imported (KeyError: 'x\\ny'); put it on the PYTHONPATH"),
    ],
)
def test_what_is_wrong_with_them_at_the_start_is_one_line(
    name: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path / "run", name)
    capsys.readouterr()
    assert run_main(tmp_path / "run", config) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: selection.learned.features={config['selection']['learned']['features'][1]}")
    assert says in line
    assert checkpoints(config) == []


def test_numbers_of_the_target_that_are_not_finite_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path / "run", "not_finite")
    write_lines(tmp_path / "run" / "target.jsonl", [*goods(3), poisoned(3)])
    capsys.readouterr()
    assert run_main(tmp_path / "run", config) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "your own features cannot be used (ValueError: a number is not finite); return an array" in line
