"""The service on a GPU, where there is one: the decisions of the CPU, in every kind of step, resumable."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.service import (
    ALL_ON,
    MODEL,
    Step,
    checkpoints,
    configuration,
    goods,
    hashes,
    jsonl,
    serve_until,
    write_lines,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

ROUNDING = 1e-3  # of losses in nats: sums are taken in another order, and updates build on updates


def settings_on(device: str, folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir()
    write_lines(folder / "stream.jsonl", goods(80))
    model = {"config": MODEL, "tokenizer": "bytes", "device": device} | sections.pop("model", {})
    return configuration(folder, jsonl(folder / "stream.jsonl"), model=model, **sections)


def assert_same(found: list[Step], expected: list[Step]) -> None:
    assert len(expected) > 3
    assert [(step.result, step.ids, step.selected) for step in found] == [
        (step.result, step.ids, step.selected) for step in expected
    ]
    for one, other in zip(found, expected, strict=True):
        assert one.losses == pytest.approx(other.losses, abs=ROUNDING)
        assert one.coefficients == pytest.approx(other.coefficients, abs=ROUNDING)


@pytest.mark.parametrize("scoring", ["exact", "rank_one", "sketched"])
@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["full", "lora"])
def test_it_decides_as_the_cpu_does(tmp_path: Path, scoring: str, lora: dict[str, int] | None) -> None:
    sections: dict[str, Any] = {
        "model": {"lora": lora},
        "selection": {"pool_size": 8, "batch_size": 3, "preconditioner_warmup_steps": 2, "scoring": scoring},
    }
    _, expected = serve_until(settings_on("cpu", tmp_path / "cpu", **sections))
    _, found = serve_until(settings_on("cuda", tmp_path / "cuda", **sections))
    assert_same(found, expected)


def test_everything_on_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    _, expected = serve_until(settings_on("cuda", tmp_path / "whole", selection=ALL_ON))
    interrupted = settings_on("cuda", tmp_path / "parts", selection=ALL_ON)
    _, first = serve_until(interrupted, last_step=2)
    _, second = serve_until(interrupted)
    assert_same(first + second, expected)


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["full", "lora"])
def test_bfloat16_with_gradient_checkpointing_trains(tmp_path: Path, lora: dict[str, int] | None) -> None:
    model = {"dtype": "bfloat16", "gradient_checkpointing": True, "lora": lora}
    summary, steps = serve_until(settings_on("cuda", tmp_path / "run", model=model))
    assert {step.result for step in steps} == {"applied"}
    assert summary.losses["target"] < 5.7  # ln(300), which is where random weights begin


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["full", "lora"])
def test_what_is_written_while_it_trains_is_what_it_would_have_waited_for(
    tmp_path: Path, lora: dict[str, int] | None
) -> None:
    """A merged model is rounded where it is merged, which is not the same place."""
    found = []
    for asynchronous in (False, True):
        checkpoint = {"every_steps": 2, "keep": 10, "asynchronous": asynchronous}
        config = settings_on("cuda", tmp_path / str(asynchronous), model={"lora": lora}, checkpoint=checkpoint)
        serve_until(config)
        found.append(
            {
                (path.name, name): digest
                for path in checkpoints(config)
                for name, digest in hashes(path).items()
                if name.endswith(".safetensors") and not (lora and name.startswith("model/"))
            }
        )
    assert len(found[0]) > 9
    assert found[0] == found[1]
