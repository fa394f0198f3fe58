"""What a checkpoint tells of how it was made, and what of it a resume reports or refuses."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stream_trainer.checkpoints.fingerprint import LOOKED_AT_BYTES, check_resume, consumed, differences, fingerprint_of
from stream_trainer.errors import CheckpointError
from stream_trainer.models.loading import load_model
from stream_trainer.models.saving import save_model
from stream_trainer.settings.schema import Settings
from tests.helpers.service import MODEL, configuration, good, goods, jsonl, write_lines

Config = dict[str, Any]


def kept(config: Config, **options: Any) -> dict[str, Any]:
    settings = Settings(**config)
    return fingerprint_of(settings, load_model(settings.model, settings.training.seed), options.get("version", "1.2.3"))


def config_of(folder: Path, **sections: dict[str, Any]) -> Config:
    folder.mkdir(exist_ok=True)
    return configuration(folder, jsonl(folder / "samples.jsonl"), **sections)


def another_target(config: Config) -> None:
    write_lines(Path(config["target"]["path"]), goods(3))


def set_to(section: str, **values: Any) -> Callable[[Config], None]:
    return lambda config: config[section].update(values)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (set_to("optimizer", learning_rate=0.5), ["optimizer.learning_rate"]),
        (set_to("training", seed=6), ["training.seed"]),
        (set_to("selection", pool_size=4), ["selection.pool_size"]),
        (set_to("model", config=MODEL | {"rms_norm_eps": 1e-3}), ["model.architecture", "model.config"]),
        (set_to("source", jsonl={"path": "another"}), ["source.jsonl.path"]),
        (another_target, ["target.path_contents"]),
        (set_to("checkpoint", keep=9), []),
        (set_to("evaluation", every_steps=3), []),
    ],
)
def test_every_change_that_matters_is_named(change: Callable[[Config], None], names: list[str], tmp_path: Path) -> None:
    config = config_of(tmp_path / "run")
    then = kept(config)
    change(config)
    assert differences(then, kept(config)) == names


def test_threads_and_versions_are_named(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run")
    then, threads = kept(config), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert differences(then, kept(config, version="2.0.0")) == ["processor.threads", "versions.stream_trainer"]
    finally:
        torch.set_num_threads(threads)


def test_where_things_lie_does_not_matter_but_what_they_hold(tmp_path: Path) -> None:
    """A model directory that was moved is the same model; other weights in the same place are another."""
    settings = Settings(**config_of(tmp_path / "run"))
    for name, seed in (("here", 1), ("there", 1), ("other", 2)):
        save_model(load_model(settings.model, seed), tmp_path / name)
    here, there, other = (
        kept(config_of(tmp_path / "run", model={"name": str(tmp_path / name), "config": None, "tokenizer": None}))
        for name in ("here", "there", "other")
    )
    assert differences(here, there) == ["model.name"]
    assert differences(here, other) == ["model.name", "model.parameters"]


def test_it_is_plain_json_without_secrets(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", selection={"weigh_options": {}})
    secret = "hush-hush"
    sasl = {"sasl_mechanism": "PLAIN", "sasl_username": secret, "sasl_password": secret, "ssl_password": secret}
    kafka = {"topic": "samples", "security_protocol": "SASL_SSL", **sasl}
    config["source"] = {"kind": "kafka", "kafka": kafka}
    config["model"]["config"] = MODEL | {"note": secret}
    found = kept(config)
    assert found == json.loads(json.dumps(found))
    assert secret not in json.dumps(found)
    assert found["source.kafka.topic"] == "samples"


def test_a_pipe_is_not_read_again(tmp_path: Path) -> None:
    """It would wait for its writer for ever."""
    config = config_of(tmp_path / "run")
    Path(config["target"]["path"]).unlink()
    os.mkfifo(config["target"]["path"])
    assert kept(config)["target.path_contents"] is None


def cursor_at(path: Path, position: int) -> dict[str, Any]:
    return {"partitions": {f"{path}:0": {"next": position, "decided": []}}, "counts": {}}


@pytest.mark.parametrize("changed_at", [0, 5, 60])
def test_a_file_is_known_by_what_was_read_of_it(changed_at: int, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    source = Settings(**config_of(tmp_path, samples={})).source
    write_lines(path, goods(100))
    cursor = cursor_at(path, 60 * len(good(0)))
    then = consumed(source, cursor)
    assert len(then) == 1
    lines = goods(100)
    write_lines(path, [*lines, b"more"])
    assert consumed(source, cursor) == then
    lines[changed_at] = lines[changed_at].replace(b"text", b"TEXT")
    write_lines(path, lines)
    assert (consumed(source, cursor) == then) == (changed_at == 60)
    path.write_bytes(b"cut")
    assert consumed(source, cursor) == {}  # the source will say that


def test_of_a_long_file_both_ends_are_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    source = Settings(**config_of(tmp_path)).source
    end = 3 * LOOKED_AT_BYTES
    found = []
    for place in (None, 0, LOOKED_AT_BYTES + 9, end - 1, end):
        content = bytearray(end + 10)
        if place is not None:
            content[place] = 1
        path.write_bytes(content)
        found.append(consumed(source, cursor_at(path, end)))
    assert [each == found[0] for each in found] == [True, False, True, False, True]


def test_a_stream_has_no_contents_to_know_it_by(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    config["source"] = jsonl(Path("-"))
    assert consumed(Settings(**config).source, cursor_at(Path("-"), 7)) == {}


def test_differences_are_one_block_and_what_would_be_wrong_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    then = {"optimizer.eps": 1e-8, "model.tokenizer_contents": "a" * 64, "training.seed": 5, "gone": 1}
    now = {"optimizer.eps": 1e-6, "model.tokenizer_contents": "b" * 64, "training.seed": 5, "new": 1}
    names = ["model.tokenizer_contents", "optimizer.eps"]
    assert check_resume(tmp_path, then, now, "accept") == names
    logged = [record for record in caplog.records if record.name.endswith("fingerprint")]
    assert {record.levelno for record in logged} == {logging.WARNING}
    assert [record.getMessage() for record in logged] == [
        f"checkpoint {tmp_path} was made otherwise; what differs, then and now:",
        f"  model.tokenizer_contents: {'a' * 12}, now {'b' * 12}",
        "  optimizer.eps: 1e-08, now 1e-06",
    ]
    with pytest.raises(
        CheckpointError, match=r"\(model.tokenizer_contents was aaaaaaaaaaaa, now b.*on_mismatch=accept$"
    ):
        check_resume(tmp_path, then, now, "fail")
    del now["model.tokenizer_contents"]
    assert check_resume(tmp_path, then, now, "fail") == ["optimizer.eps"]
    caplog.clear()
    assert check_resume(tmp_path, {}, now, "fail") == []  # from before there were fingerprints
    assert caplog.text == ""
