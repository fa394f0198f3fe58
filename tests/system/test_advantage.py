"""Whether selection pays, on streams of which that is known: what is predicted, what is measured, what is done then."""

import json
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from stream_trainer.demo import stream as demo
from stream_trainer.service import serve
from stream_trainer.settings.schema import Settings
from stream_trainer.training.watchers import Watcher
from tests.helpers.service import MODEL, configuration, jsonl, note_trainers

STEPS, POOL = 100, 16
ONLY_THE_TARGETS_KIND = {**dict.fromkeys(demo.SHARES, 0.0), demo.TARGET: 1.0}
LARGER = MODEL | {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 256}


@dataclass
class Found:
    """What a run knew after each step, and its last measured effects."""

    predicted: list[float | None] = field(default_factory=list)
    measured: list[float | None] = field(default_factory=list)
    pays: list[bool | None] = field(default_factory=list)
    events: list[tuple[int, str]] = field(default_factory=list)
    chosen: float = 0.0
    uniform: float = 0.0


def records_of(folder: Path, shares: dict[str, float], count: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stream in which kinds have these shares, with its target beside it."""
    monkeypatch.setattr(demo, "SHARES", shares)
    folder.mkdir()
    return demo.write_stream(folder, count, seed).records


def shuffled(target: Path) -> None:
    """The target's prompts and responses, each with its characters in disorder."""
    chance, lines = random.Random(1), [json.loads(line) for line in target.read_text().splitlines()]
    for sample in lines:
        for name in ("prompt", "response"):
            letters = list(sample[name])
            chance.shuffle(letters)
            sample[name] = "".join(letters)
    target.write_text("".join(f"{json.dumps(sample)}\n" for sample in lines))


def trained(folder: Path, records: Path, steps: int, monkeypatch: pytest.MonkeyPatch, **advantage: Any) -> Found:
    """A run that compares and measures every second step."""
    made = note_trainers(monkeypatch)
    found = Found()

    def on_step(_step: int, _pool: Sequence[Any], _report: Any) -> None:
        paying = made[0].paying
        found.predicted.append(paying.predicted.advantage)
        found.measured.append(paying.measured_advantage)
        found.pays.append(paying.pays)

    selection = {"pool_size": POOL, "batch_size": 4, "preconditioner_warmup_steps": 10}
    own = {"every_steps": 2, "shadow_every": 2, **advantage}
    config = configuration(
        folder,
        jsonl(records),
        model={"config": LARGER, "tokenizer": "bytes"},
        target={"path": str(records.with_name("target.jsonl")), "max_samples": 32, "held_back": 12},
        selection={**selection, "advantage": own},
        optimizer={"learning_rate": 2e-3, "warmup_steps": 20},
        training={"max_steps": steps, "seed": 0, "threads": 1},
    )
    watcher = Watcher(on_step, on_event=lambda step, kind, _: found.events.append((step, kind)))
    serve(Settings(**config), threading.Event(), watcher)
    assert made[0].paying.shadows is not None
    found.chosen, found.uniform = made[0].paying.shadows.measured.means or (0.0, 0.0)
    return found


def like_the_stream(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target of a benchmark's control: as many samples of the stream as it was, whatever their kind."""
    count = len(target.read_text().splitlines())
    other = records_of(target.with_name("other"), dict(demo.SHARES), 400, 100, monkeypatch)
    usable = [line for line in other.read_bytes().splitlines(keepends=True) if b'"domain"' in line]
    target.write_bytes(b"".join(usable[:count]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["only", "demo", "shuffled", "random"])
def test_what_is_predicted_is_what_is_measured(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chance does as well on a stream of the target's kind alone, and for a target of random samples of the stream.

    For a target in disorder it does not: what has its letters really lowers the loss on such samples that were held
    back.
    """
    shares = ONLY_THE_TARGETS_KIND if kind == "only" else dict(demo.SHARES)
    records = records_of(tmp_path / "stream", shares, STEPS * POOL + 64, 0, monkeypatch)
    if kind == "shuffled":
        shuffled(records.with_name("target.jsonl"))
    if kind == "random":
        like_the_stream(records.with_name("target.jsonl"), monkeypatch)
    found = trained(tmp_path, records, STEPS, monkeypatch)
    predicted, measured = found.predicted[-1], found.measured[-1]
    assert predicted is not None
    assert measured is not None
    if kind == "random":
        assert max(predicted, measured) < 1.25
    elif kind == "only":
        assert max(predicted, measured) < 1.1
        assert (found.pays[-1], [name for _, name in found.events]) == (False, ["selection_does_not_pay"])
    else:
        assert min(predicted, measured) > 1.3
        assert found.chosen > 1.3 * max(0.0, found.uniform)
        assert (found.pays[-1], found.events) == (True, [])


@pytest.mark.slow
def test_a_fallback_takes_over_and_leaves_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream of the target's kind alone, that becomes a mixed one in its middle."""
    kinds = [ONLY_THE_TARGETS_KIND, dict(demo.SHARES)]
    files = [
        records_of(tmp_path / f"stream-{i}", shares, STEPS * POOL, i, monkeypatch) for i, shares in enumerate(kinds)
    ]
    halves = [file.read_bytes().splitlines(keepends=True)[: STEPS * POOL // 2] for file in files]
    files[0].write_bytes(b"".join(halves[0] + halves[1]))
    found = trained(tmp_path, files[0], STEPS - 4, monkeypatch, when_not_paying="uniform", window=8)
    assert [name for _, name in found.events] == ["selection_does_not_pay", "selection_pays"]
    assert found.events[0][0] < STEPS / 2 < found.events[1][0]
    assert found.pays[-1]
