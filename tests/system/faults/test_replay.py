"""The steps between two checkpoints, made again from the recorded order: equal to the bit, or told where not."""

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from stream_trainer.checkpoints.manifest import write_manifest
from stream_trainer.checkpoints.plan import NAME, lines_of, read_plan
from stream_trainer.cli import main
from stream_trainer.records import Sample
from stream_trainer.service import serve
from stream_trainer.settings.schema import Settings
from stream_trainer.training.step import StepReport
from tests.helpers.brokers import create_topic, publish
from tests.helpers.service import (
    ALL_ON,
    checkpoints,
    configuration,
    good,
    goods,
    jsonl,
    kafka,
    run_main,
    trainer_json,
    write_lines,
)


def everything_on(folder: Path, **sections: Any) -> dict[str, Any]:
    """240 records, one in 30 of them no sample; a checkpoint every six steps, and all of them kept."""
    lines = folder / "samples.jsonl"
    write_lines(lines, [b"{" if number % 30 == 7 else good(number) for number in range(240)])
    config = configuration(
        folder,
        jsonl(lines),
        target={"refresh_samples": 2},
        checkpoint={"every_steps": 6, "keep": 100},
        **sections,
    )
    return config | {"selection": ALL_ON}


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def replayed(
    folder: Path, config: dict[str, Any], first: str, last: str, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """`stream-trainer replay`: exit code, and all it said."""
    file = folder / "replay.yaml"
    file.write_text(yaml.safe_dump(config))
    code = main(["replay", f"--config={file}", f"--from={first}", f"--to={last}", f"--scratch={folder}"])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_a_replay_is_equal_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = everything_on(tmp_path)
    assert run_main(tmp_path, config) == 0
    names = [path.name for path in checkpoints(config)]
    assert len(names) >= 4
    before = files_below(tmp_path / "checkpoints") | files_below(tmp_path / "dead-letters.jsonl")
    code, said = replayed(tmp_path, config, names[1], names[3], capsys)
    assert code == 0, said
    assert "equal: 12 steps, " in said
    assert files_below(tmp_path / "checkpoints") | files_below(tmp_path / "dead-letters.jsonl") == before
    code, said = replayed(tmp_path, config, str(checkpoints(config)[0]), names[-1], capsys)
    assert code == 0, said
    assert f"equal: {trainer_json(config)['step']} steps, 240 records" in said
    assert not list(tmp_path.glob("stream-trainer-replay-*"))


def test_a_run_that_was_stopped_in_between_is_equal_to_one_that_was_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new process plans its first step from what it reads again."""
    config = everything_on(tmp_path)
    assert run_main(tmp_path, config | {"training": config["training"] | {"max_steps": 9}}) == 0
    assert run_main(tmp_path, config) == 0
    names = [path.name for path in checkpoints(config)]
    code, said = replayed(tmp_path, config, names[1], names[-1], capsys)
    assert code == 0, said


def test_another_weight_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = everything_on(tmp_path)
    assert run_main(tmp_path, config) == 0
    first, last = checkpoints(config)[1:3]
    file = last / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"].view(torch.int32)[0] ^= 1
    save_file(weights, file, metadata={"format": "pt"})
    (last / "manifest.json").unlink()
    write_manifest(last, 12)
    code, said = replayed(tmp_path, config, first.name, last.name, capsys)
    assert code == 1
    assert "differs: model/model.safetensors: model.norm.weight\n1 of " in said


def test_other_settings_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = everything_on(tmp_path)
    assert run_main(tmp_path, config) == 0
    first, last = checkpoints(config)[1:3]
    config["optimizer"] = {"learning_rate": 1.1e-3}
    code, said = replayed(tmp_path, config, first.name, last.name, capsys)
    assert code == 1
    assert "warning: made otherwise now than then" in said
    assert "optimizer.learning_rate" in said


def without_a_step(config: dict[str, Any]) -> None:
    plan = Path(config["checkpoint"]["dir"]) / NAME
    plan.write_bytes(lines_of(entry for step, entry in read_plan(plan).items() if step != 9))


def without_records(config: dict[str, Any]) -> None:
    path = Path(config["source"]["jsonl"]["path"])
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:130]))


def with_other_records(config: dict[str, Any]) -> None:
    path = Path(config["source"]["jsonl"]["path"])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:130], *(b"x" * (len(line) - 1) + b"\n" for line in lines[130:])]))


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (without_a_step, "does not have step 9"),
        (without_records, "replay checkpoints whose records the stream still holds"),
        (with_other_records, "replay checkpoints whose records the stream still holds"),
    ],
)
def test_what_cannot_be_replayed_is_told_in_a_line(
    break_it: Callable[[dict[str, Any]], None], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = everything_on(tmp_path)
    assert run_main(tmp_path, config) == 0
    first, last = checkpoints(config)[1], checkpoints(config)[-1]
    break_it(config)
    code, found = replayed(tmp_path, config, first.name, last.name, capsys)
    assert code == 2
    assert said in found.splitlines()[-1]


def test_a_checkpoint_that_is_not_there_is_told_with_those_that_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = everything_on(tmp_path, training={"max_steps": 6})
    assert run_main(tmp_path, config) == 0
    names = [path.name for path in checkpoints(config)]
    code, found = replayed(tmp_path, config, names[0], "step-00000099.e1", capsys)
    assert code == 2
    assert all(name in found for name in names)
    assert replayed(tmp_path, config, names[1], names[0], capsys)[0] == 2
