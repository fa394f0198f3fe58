"""Estimates of space against what is really written and held."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stream_trainer.commands.checking import space as spaces
from stream_trainer.commands.checking.space import checkpoint_bytes, memory_bytes, sizes_of, space
from stream_trainer.commands.checking.unused import without_effect
from stream_trainer.settings.schema import Settings
from tests.families.configurations import BY_TITLE
from tests.helpers.service import MODEL, SELECTION, checkpoints, configuration, good, jsonl, serve_until, write_lines

BIG = {**MODEL, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "int8": {"optimizer": {"moments": "int8"}},
    "mask": {"selection": SELECTION | {"mask": "dual_sft", "dual_sft": {"density": 0.3, "refresh_steps": 3}}},
    "lora": {"model": {"config": BIG, "tokenizer": "bytes", "lora": {"rank": 32}}},
    "tied": {"model": {"config": BIG | {"tie_word_embeddings": True, "vocab_size": 3000}, "tokenizer": "bytes"}},
}


def config_of(folder: Path, kind: str = "full") -> dict[str, Any]:
    sections = {"model": {"config": BIG, "tokenizer": "bytes"}} | KINDS[kind]
    return configuration(folder, jsonl(folder / "samples.jsonl"), **sections)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_takes_what_was_foretold(kind: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "samples.jsonl", [good(number) for number in range(16)])
    config = config_of(tmp_path, kind)
    serve_until(config)
    settings = Settings(**config)
    sizes = sizes_of(settings)
    assert sizes is not None
    written = sum(file.stat().st_size for file in checkpoints(config)[-1].rglob("*") if file.is_file())
    assert checkpoint_bytes(settings, sizes) == pytest.approx(written, rel=0.05)


def test_memory_is_counted_by_what_holds_it(tmp_path: Path) -> None:
    settings = Settings(**config_of(tmp_path))
    sizes = sizes_of(settings)
    assert sizes is not None
    parts = memory_bytes(settings, sizes)
    assert parts["weights"] == parts["gradient"] == parts["target's gradient"] == 4 * sizes.base
    assert parts["moments"] == 8 * sizes.base
    assert "copy for checkpoints" not in parts
    apart = settings.model_copy(update={"checkpoint": settings.checkpoint.model_copy(update={"asynchronous": True})})
    assert memory_bytes(apart, sizes)["copy for checkpoints"] == 16 * sizes.base
    # Per layer: four projections of attention, of 128 and 64 wide, and three of 128 and 256.
    per_token = 3 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 256))
    assert parts["factors of a pool, at most"] == 4 * per_token * 8 * settings.samples.max_tokens


def test_factors_of_experts_are_counted_and_not_bounded(tmp_path: Path) -> None:
    model = {"config": BY_TITLE["Mixtral"].config, "tokenizer": "bytes"}
    settings = Settings(**config_of(tmp_path) | {"model": model, "memory": {"factors_gb": 0}})
    sizes = sizes_of(settings)
    assert sizes is not None
    # In two layers two experts of a token: both products at once, 16 and 64 wide, and then 32 and 16.
    assert sizes.of_experts == 2 * 2 * (16 + 2 * 32 + 32 + 16)
    kept = memory_bytes(settings, sizes)["factors of a pool, at most"]
    assert kept == 4 * sizes.of_experts * settings.selection.pool_size * settings.samples.max_tokens


def test_too_little_of_either_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(**config_of(tmp_path))
    memory, disk = space(settings)
    assert memory.ok
    assert disk.ok
    sizes = sizes_of(settings)
    assert sizes is not None
    room = 4 * checkpoint_bytes(settings, sizes)  # three that are kept, and one that is written
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=room))
    monkeypatch.setattr(spaces, "_free_memory", lambda _: 20 * sizes.base)
    assert [check.ok for check in space(settings)] == [True, True]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=room - 1))
    monkeypatch.setattr(spaces, "_free_memory", lambda _: 20 * sizes.base - 1)
    memory, disk = space(settings)
    assert "free; set model.lora" in memory.detail
    assert f"checkpoint.dir={tmp_path / 'checkpoints'} has" in disk.detail
    assert not memory.ok
    assert not disk.ok


def test_a_model_that_cannot_be_made_is_left_to_loading(tmp_path: Path) -> None:
    config = config_of(tmp_path) | {"model": {"name": str(tmp_path)}}
    assert list(space(Settings(**config))) == []


def test_settings_without_effect_are_named_with_the_reason(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert without_effect(Settings(**config)) == []
    config["source"] = config["source"] | {"kafka": {"topic": "t", "schema_registry": {"url": "http://x"}}}
    config["optimizer"] = {"decay_steps": 10}
    config["publish"] = {"max_forgetting": 0.2}
    config["selection"] = SELECTION | {"waiting": 99, "intake": 9, "gast": {"per_layer": 3}, "greedy": {}}
    assert without_effect(Settings(**config)) == [
        "source.kafka.schema_registry.url has no effect: source.kind is jsonl",
        "source.kafka.topic has no effect: source.kind is jsonl",
        "selection.waiting has no effect: selection.draw is all",
        "selection.intake has no effect: selection.draw is all",
        "selection.gast.per_layer has no effect: selection.route is none",
        "optimizer.decay_steps has no effect: optimizer.schedule is constant",
        "publish.max_forgetting has no effect: publish.dir is unset",
    ]
