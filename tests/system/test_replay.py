"""The steps between two checkpoints, made again from the recorded order: equal to the bit, or told where not."""

import json
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from kafka import KafkaProducer
from safetensors.torch import load_file, save_file

from stream_trainer.checkpoints.manifest import write_manifest
from stream_trainer.checkpoints.plan import NAME, Entry, lines_of, read_plan
from stream_trainer.cli import main
from tests.helpers.brokers import ApacheKafka, create_topic
from tests.helpers.service import (
    ALL_ON,
    checkpoints,
    command,
    configuration,
    good,
    jsonl,
    kafka,
    run_main,
    serve_until,
    trainer_json,
    wait_for,
    write_lines,
)
from tests.system.test_service_kafka import committed


def everything_on(folder: Path, **sections: Any) -> dict[str, Any]:
    """160 records, one in 30 of them no sample; a checkpoint every four steps, and all of them kept."""
    lines = folder / "samples.jsonl"
    write_lines(lines, [b"{" if number % 30 == 7 else good(number) for number in range(160)])
    return of_all_parts(folder, jsonl(lines), **sections)


def of_all_parts(folder: Path, source: dict[str, Any], **sections: Any) -> dict[str, Any]:
    config = configuration(
        folder,
        source,
        target={"refresh_samples": 2},
        checkpoint={"every_steps": 4, "keep": 100},
        **sections,
    )
    return config | {"selection": ALL_ON}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a run that came to its end."""
    folder = tmp_path_factory.mktemp("made")
    config = everything_on(folder)
    assert run_main(folder, config) == 0
    assert len(checkpoints(config)) >= 4
    return config


@pytest.fixture
def copied(made: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The same, with checkpoints that a test may change."""
    shutil.copytree(made["checkpoint"]["dir"], tmp_path / "checkpoints")
    return made | {"checkpoint": made["checkpoint"] | {"dir": str(tmp_path / "checkpoints")}}


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


def test_a_replay_is_equal_and_writes_nothing(
    made: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names, folder = [path.name for path in checkpoints(made)], Path(made["checkpoint"]["dir"]).parent
    before = files_below(folder)
    code, said = replayed(tmp_path, made, names[1], names[3], capsys)
    assert code == 0, said
    assert "equal: 8 steps, " in said
    code, said = replayed(tmp_path, made, str(checkpoints(made)[0]), names[-1], capsys)
    assert code == 0, said
    assert f"equal: {trainer_json(made)['step']} steps, 160 records" in said
    assert files_below(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["replay.yaml"]


@pytest.mark.slow
def test_a_run_that_was_stopped_in_between_is_replayed_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new process plans its first step from what it reads again."""
    config = everything_on(tmp_path)
    assert run_main(tmp_path, config | {"training": config["training"] | {"max_steps": 6}}) == 0
    assert run_main(tmp_path, config | {"training": config["training"] | {"max_steps": 10}}) == 0
    names = [path.name for path in checkpoints(config)]
    code, said = replayed(tmp_path, config, names[1], names[-1], capsys)
    assert code == 0, said
    assert "equal: 6 steps" in said


@pytest.mark.slow
def test_a_live_draw_that_learns_from_its_time_is_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = everything_on(tmp_path)
    config["selection"] = {name: ALL_ON[name] for name in ("pool_size", "batch_size", "waiting", "intake")}
    config["selection"] |= {"draw": "auto", "preconditioner_warmup_steps": 2, "learned": {"probe_every": 3}}
    assert run_main(tmp_path, config) == 0
    names = [path.name for path in checkpoints(config)]
    code, said = replayed(tmp_path, config, names[1], names[-1], capsys)
    assert code == 0, said


def test_another_weight_is_named(copied: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, last = checkpoints(copied)[1:3]
    file = last / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"].view(torch.int32)[0] ^= 1
    save_file(weights, file, metadata={"format": "pt"})
    (last / "manifest.json").unlink()
    write_manifest(last, 8)
    code, said = replayed(tmp_path, copied, first.name, last.name, capsys)
    assert code == 1
    assert "differs: model/model.safetensors: model.norm.weight\n1 of " in said


@pytest.mark.parametrize("what", ["the target was replaced", "the run went back to an earlier model"])
def test_a_course_that_was_left_in_between_is_told(
    what: str, copied: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, last = checkpoints(copied)[1:3]
    state = json.loads((last / "trainer.json").read_text())
    state["fingerprint"]["target.path_contents"] += "0" if "target" in what else ""
    state["parts"]["recovery"]["factor"] *= 1.0 if "target" in what else 0.125
    (last / "trainer.json").write_text(json.dumps(state))
    (last / "manifest.json").unlink()
    write_manifest(last, 8)
    code, said = replayed(tmp_path, copied, first.name, last.name, capsys)
    assert code == 2
    assert f"error: between {first.name} and {last.name} {what}, which cannot be made again; replay up to " in said
    assert "Traceback" not in said


def test_other_settings_are_told(made: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, last = checkpoints(made)[1:3]
    code, said = replayed(tmp_path, made | {"optimizer": {"learning_rate": 1.1e-3}}, first.name, last.name, capsys)
    assert code == 1
    assert "warning: made otherwise now than then" in said
    assert "optimizer.learning_rate" in said


def test_steps_that_are_not_in_the_plan_are_told(
    copied: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Path(copied["checkpoint"]["dir"]) / NAME
    plan.write_bytes(lines_of(entry for step, entry in read_plan(plan).items() if step != 7))
    code, said = replayed(tmp_path, copied, checkpoints(copied)[1].name, checkpoints(copied)[3].name, capsys)
    assert code == 2
    assert "does not have step 7" in said


def cut(lines: list[bytes]) -> list[bytes]:
    return lines[:90]


def spoilt(lines: list[bytes]) -> list[bytes]:
    return lines[:90] + [b"x" * (len(line) - 1) + b"\n" for line in lines[90:]]


@pytest.mark.parametrize("change", [cut, spoilt])
def test_records_that_are_gone_are_told(
    change: Callable[[list[bytes]], list[bytes]],
    made: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, last = checkpoints(made)[1], checkpoints(made)[-1]
    path = Path(made["source"]["jsonl"]["path"])
    content = path.read_bytes()
    path.write_bytes(b"".join(change(content.splitlines(keepends=True))))
    try:
        code, said = replayed(tmp_path, made, first.name, last.name, capsys)
    finally:
        path.write_bytes(content)
    assert code == 2
    assert "replay checkpoints whose records the stream still holds" in said.splitlines()[-1]


def test_a_checkpoint_that_is_not_there_is_told_with_those_that_are(
    made: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [path.name for path in checkpoints(made)]
    code, found = replayed(tmp_path, made, names[0], "step-00000099.e1", capsys)
    assert code == 2
    assert all(name in found for name in names)
    assert replayed(tmp_path, made, names[1], names[0], capsys)[0] == 2


def produce_unevenly(servers: str, topic: str, stop: threading.Event, begun: Callable[[], bool]) -> None:
    """A few samples now for one partition, now for another, with pauses; the first step has to begin with a few."""
    chance, number = random.Random(0), 0
    producer = KafkaProducer(bootstrap_servers=servers, linger_ms=0)
    while not stop.wait(chance.choice((0, 0.01, 0.05))):
        if number > 8 and not begun():
            continue
        partition = chance.choice((0, 0, 0, 1, 1, 2))
        for _ in range(chance.randint(1, 8)):
            producer.send(topic, b"{" if number % 40 == 9 else good(number), partition=partition)
            number += 1
        producer.flush()
    producer.close()


@contextmanager
def live(servers: str, topic: str, folder: Path) -> Iterator[dict[str, Any]]:
    """The settings of a run in `folder` on a topic of three partitions that is filled meanwhile."""
    create_topic(servers, topic, 3)
    stop = threading.Event()
    config = of_all_parts(folder, kafka(servers, topic, stop_at_end=False), buffer={"wait_s": 0.05})
    producing = threading.Thread(target=produce_unevenly, args=(servers, topic, stop, lambda: bool(planned_of(config))))
    producing.start()
    try:
        yield config
    finally:
        stop.set()
        producing.join()


def planned_of(config: dict[str, Any]) -> dict[int, Entry]:
    return read_plan(Path(config["checkpoint"]["dir"]) / NAME)


@pytest.mark.slow
def test_a_live_run_on_three_uneven_partitions_is_replayed_to_the_bit(
    apache_kafka: ApacheKafka, topic: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servers = apache_kafka.bootstrap_servers
    with live(servers, topic, tmp_path) as config:
        serve_until(config, 40)
        names = [path.name for path in checkpoints(config)]
        entries = planned_of(config).values()
        turns = [position.partition for entry in entries for position in entry.planned.records]
        assert any((now - before) % 3 != 1 for before, now in pairwise(turns)), "no partition was passed over"
        assert len({entry.planned.candidates for entry in entries}) > 1, "no step was short of samples"
        before = committed(servers, topic)
        code, said = replayed(tmp_path, config, names[1], names[-1], capsys)
        assert code == 0, said
        assert "equal: 36 steps" in said
        assert committed(servers, topic) == before


@pytest.mark.slow
def test_steps_of_a_live_run_that_was_killed_are_made_of_the_same_again(
    apache_kafka: ApacheKafka, topic: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with live(apache_kafka.bootstrap_servers, topic, tmp_path) as config:
        config["checkpoint"]["every_steps"] = 20
        with command(tmp_path, config) as process:
            wait_for(lambda: max(planned_of(config), default=0) >= 31 or process.poll() is not None)
            process.kill()
            process.wait()
        assert trainer_json(config)["step"] == 20
        lost = planned_of(config)
        serve_until(config, max(lost) + 9)
        again = planned_of(config)
        assert {step: again[step] for step, entry in lost.items() if entry.made is not None} == {
            step: entry for step, entry in lost.items() if entry.made is not None
        }
        names = [path.name for path in checkpoints(config)]
        code, said = replayed(tmp_path, config, names[0], names[-1], capsys)
        assert code == 0, said
