"""The offline command on files."""

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from stream_trainer.commands import select_cluster_ucb
from stream_trainer.errors import SettingsError
from stream_trainer.ingest.letter import read_dead_letters
from stream_trainer.models.loading import load_model
from stream_trainer.models.saving import save_model
from stream_trainer.records import Sample
from stream_trainer.samples.collate import collate
from stream_trainer.samples.decoder import Decoder, read_samples
from stream_trainer.settings.schema import ModelSettings, SampleSettings
from tests.helpers.oracle import dense
from tests.helpers.tiny_models import settings_of, shake

KINDS = ("one two three four", "ABC DEF GHI JKL", "9 + 9 = 18; 8 + 8 = 16")
BAD = ("{broken", '{"prompt": "no response"}', '["list"]', '{"text": "\\ud800"}')


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A model with random weights, a target of one kind, and a pool of three kinds with bad lines among them."""
    loaded = load_model(settings_of("llama"), seed=1)
    shake(loaded.model)
    save_model(loaded, tmp_path / "model")
    target = [json.dumps({"text": f"{KINDS[1]} {number}"}) for number in range(4)]
    (tmp_path / "target.jsonl").write_text("\n".join(target) + "\n")
    lines = [json.dumps({"text": f"{KINDS[n % 3]} {n}", "id": f"sample {n}", "extra": n}) for n in range(60)]
    lines = [*lines[:20], *BAD, *lines[20:40], "", *lines[40:]]
    (tmp_path / "pool.jsonl").write_text("\r\n".join(lines))  # the last line has no end
    return tmp_path


def options(place: Path, **changes: str) -> argparse.Namespace:
    values = {
        "model": str(place / "model"),
        "pool": str(place / "pool.jsonl"),
        "target": str(place / "target.jsonl"),
        "out": str(place / "out"),
        "budget": "40%",
        "data": "0.1",
        "clusters": "6",
        **changes,
    }
    parser = argparse.ArgumentParser(exit_on_error=False)
    select_cluster_ucb.add_arguments(parser)
    return parser.parse_args([f"--{name.replace('_', '-')}={value}" for name, value in values.items()])


def select(place: Path, **changes: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    args = options(place, **changes)
    assert select_cluster_ucb.run(args) == 0
    read = [(args.out / name).read_text().splitlines() for name in ("subset.jsonl", "scores.jsonl")]
    subset, scores = ([json.loads(line) for line in lines] for lines in read)
    return subset, scores


def test_what_is_written_agrees(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subset, scores = select(place)
    assert len(subset) == 6
    assert len(scores) == 24
    assert [score["rank"] for score in scores] == list(range(1, 25))
    assert all(a["score"] >= b["score"] for a, b in pairwise(scores))
    assert len({score["line"] for score in scores}) == 24
    assert [line["id"] for line in subset] == [score["id"] for score in scores[:6]]
    pool = (place / "pool.jsonl").read_text().splitlines()
    assert all(json.loads(pool[score["line"] - 1])["id"] == score["id"] for score in scores)
    assert all(line in pool for line in (place / "out" / "subset.jsonl").read_text().splitlines())
    assert not list((place / "out").glob(".*"))
    assert "scored 24 of 60 samples (40.0%)" in capsys.readouterr().out


def test_bad_lines_are_kept_and_counted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # a second run replaces the first
        select(place)
        kept = list(read_dead_letters(place / "out" / "rejected.jsonl"))
        assert [letter.record.value for letter in kept] == [f"{line}\r\n".encode() for line in BAD]
        assert [letter.reason for letter in kept] == ["bad_json", "missing_fields", "not_an_object", "lone_surrogate"]
        assert "rejected 4 lines" in capsys.readouterr().out


def test_t6_scores_are_the_exact_cosine_with_the_target(place: Path) -> None:
    """Nothing is projected: against autograd, one sample at a time."""
    _, scores = select(place, budget="100%")
    loaded = load_model(ModelSettings(name=str(place / "model")), seed=0)
    decoder = Decoder(loaded.tokenizer, SampleSettings(), loaded.max_positions)

    def gradients(samples: list[Sample]) -> torch.Tensor:
        return dense(loaded.model, collate(samples, loaded.tokenizer.pad_token_id)).gradients

    lines = [line for line in (place / "pool.jsonl").read_text().splitlines() if line and line not in BAD]
    (place / "good.jsonl").write_text("\n".join(lines) + "\n")
    pool = gradients(read_samples(place / "good.jsonl", decoder, 100, ""))
    direction = gradients(read_samples(place / "target.jsonl", decoder, 100, "")).mean(0)
    expected = torch.nn.functional.cosine_similarity(pool, direction[None])
    assert len(scores) == 60
    for score in scores:
        assert score["score"] == pytest.approx(float(expected[int(score["id"].split()[1])]), abs=1e-4)


def test_what_is_selected_is_of_the_kind_of_the_target(place: Path) -> None:
    subset, _ = select(place, budget="100%")
    assert all(KINDS[1] in line["text"] for line in subset)


def test_the_seed_decides(place: Path) -> None:
    def lines(seed: int) -> list[int]:
        return [score["line"] for score in select(place, seed=str(seed))[1]]

    assert lines(1) == lines(1)
    assert lines(1) != lines(2)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pool": "none.jsonl"}, "--pool=none.jsonl cannot be read"),
        ({"target": "none.jsonl"}, "--target=none.jsonl cannot be read"),
        ({"model": "./none"}, "./none is not a directory"),
        ({"data": "50%"}, "--data=0.5 is more than --budget=0.4"),
        ({"data": "1%"}, "--data=0.01 of 60 samples is none"),
        ({"out": "target.jsonl/out"}, "cannot be written"),
    ],
    ids=lambda value: "=".join(*value.items()) if isinstance(value, dict) else "",
)
def test_mistakes_are_one_line(
    place: Path, changes: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(SettingsError) as caught:
        select(place, **changes)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pool_without_samples_is_refused(place: Path) -> None:
    (place / "pool.jsonl").write_text("\n".join(BAD))
    with pytest.raises(SettingsError, match=r"holds no samples \(4 lines rejected\)"):
        select(place)
    assert len(list(read_dead_letters(place / "out" / "rejected.jsonl"))) == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [("budget", "0"), ("budget", "120%"), ("data", "some"), ("clusters", "0"), ("beta", "nan"), ("max_tokens", "1")],
)
def test_wrong_values_name_the_option(place: Path, name: str, value: str) -> None:
    with pytest.raises(argparse.ArgumentError, match=f"--{name.replace('_', '-')}.*{value}"):
        options(place, **{name: value})
