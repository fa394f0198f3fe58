"""What the settings name is looked for before anything is loaded."""

import gc
import os
import shutil
import socket
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from stream_trainer.commands import check as checks
from stream_trainer.commands.check import check_all, check_offline, require
from stream_trainer.commands.checking.result import Check
from stream_trainer.errors import SettingsError
from stream_trainer.settings.loading import load_settings
from stream_trainer.settings.schema import LoraSettings, Settings


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings under which every check succeeds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "unknown"}')
    save_file({"weight": torch.zeros(1)}, tmp_path / "model" / "model.safetensors")
    for name in ("target.jsonl", "samples.jsonl", "retention.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    options = [
        "--source.kind=jsonl",
        "--source.jsonl.path=samples.jsonl",
        "--target.path=target.jsonl",
        "--evaluation.retention_path=retention.jsonl",
        "--model.name=model",
        "--server.port=0",
    ]
    return load_settings(None, options)


def changed(settings: Settings, section: str, **values: object) -> Settings:
    return settings.model_copy(update={section: getattr(settings, section).model_copy(update=values)})


def failures(found: list[Check]) -> list[str]:
    return [check.detail for check in found if not check.ok]


def test_all_is_well(settings: Settings) -> None:
    found = check_all(settings)
    assert failures(found) == []
    assert {check.name for check in found} >= {"target.path", "source.jsonl.path", "checkpoint.dir", "server.port"}
    require(found)


def test_standard_input_needs_no_file(settings: Settings) -> None:
    jsonl = settings.source.jsonl.model_copy(update={"path": "-"})
    found = check_offline(changed(settings, "source", jsonl=jsonl))
    assert failures(found) == []
    assert "source.jsonl.path" not in {check.name for check in found}


@pytest.mark.parametrize("name", ["target.jsonl", "samples.jsonl", "retention.jsonl"])
def test_a_file_that_is_missing(settings: Settings, name: str) -> None:
    Path(name).unlink()
    (line,) = failures(check_offline(settings))
    assert line.endswith(f"={name} cannot be read (No such file or directory); correct the path")


def test_every_file_that_is_named_is_looked_for(settings: Settings) -> None:
    none = Path("none.jsonl")
    evaluation = changed(settings, "evaluation", sets={"news": none})
    selection = settings.selection
    dual_sft = selection.dual_sft.model_copy(update={"anchor_path": none})
    masked = changed(evaluation, "selection", mask="dual_sft", mask_path=none, dual_sft=dual_sft)
    names = [line.partition("=")[0] for line in failures(check_offline(masked))]
    assert names == ["selection.mask_path", "evaluation.sets.news", "selection.dual_sft.anchor_path"]
    unmasked = changed(masked, "selection", mask="none", mask_path=None, dual_sft=dual_sft)
    assert [line.partition("=")[0] for line in failures(check_offline(unmasked))] == ["evaluation.sets.news"]


@pytest.mark.parametrize("kind", ["file", "topic"])
def test_dead_letters_need_a_file_beside_a_topic_too(settings: Settings, kind: str) -> None:
    Path("file").touch()
    (line,) = failures(check_offline(changed(settings, "dead_letters", kind=kind, path=Path("file/letters.jsonl"))))
    assert line.startswith("dead_letters.path=file/letters.jsonl cannot be made")


def test_every_failure_is_a_line(settings: Settings) -> None:
    Path("target.jsonl").unlink()
    with pytest.raises(SettingsError) as raised:
        require(check_offline(changed(settings, "model", device="tpu")))
    assert [line.partition("=")[0] for line in str(raised.value).splitlines()] == ["target.path", "model.device"]


def test_directories_are_made_later_but_not_below_a_file(settings: Settings) -> None:
    assert failures(check_offline(changed(settings, "checkpoint", dir=Path("new/deep")))) == []
    (line,) = failures(check_offline(changed(settings, "checkpoint", dir=Path("target.jsonl/deep"))))
    assert "target.jsonl is no directory" in line
    (line,) = failures(check_offline(changed(settings, "dead_letters", path=Path("target.jsonl/dead"))))
    assert line.startswith("dead_letters.path=")
    (line,) = failures(check_offline(changed(settings, "dead_letters", path=Path("model"))))
    assert line == "dead_letters.path=model is a directory; name a file"


def test_a_read_only_place(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # permissions do not stop root
    lines = failures(check_offline(settings))
    assert [line.partition("=")[0] for line in lines] == ["checkpoint.dir", "dead_letters.path"]


def test_a_disk_that_is_too_small_for_a_checkpoint(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = {"weight": torch.empty(2**20, 2, dtype=torch.bfloat16)}  # 4 MiB of it make 24 in a checkpoint
    save_file(stored, "model/model.safetensors")
    Path("model/torn.safetensors").write_bytes(b"torn")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=23 * 2**20))
    (line,) = failures(check_offline(settings))
    assert "has 0.0 GiB free, one checkpoint takes 0.0 GiB or more" in line
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=24 * 2**20))
    assert failures(check_offline(settings)) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    adapters = changed(settings, "model", lora=LoraSettings(rank=4))
    assert failures(check_offline(adapters)) == []


@pytest.mark.parametrize("name", ["/no/such/model", "./model2", "a/b/c", "target.jsonl"])
def test_neither_a_directory_nor_a_name_on_the_hub(settings: Settings, name: str) -> None:
    (line,) = failures(check_offline(changed(settings, "model", name=name)))
    assert line.startswith(f"model.name={name} is not a directory; ")
    (line,) = failures(check_offline(changed(settings, "model", tokenizer=name)))
    assert line.startswith(f"model.tokenizer={name} is not a directory; ")


def test_a_name_on_the_hub_may_be_right(settings: Settings) -> None:
    found = check_offline(changed(settings, "model", name="owner/some-model", tokenizer="bytes"))
    assert failures(found) == []
    assert "looked up on the hub" in next(check.detail for check in found if check.name == "model.name")


@pytest.mark.parametrize(("device", "problem"), [("tpu", "is unknown"), ("cuda:9999", "is not available")])
def test_devices(settings: Settings, device: str, problem: str) -> None:
    (line,) = failures(check_offline(changed(settings, "model", device=device)))
    assert line.startswith(f"model.device={device} {problem}")


def test_extras_that_are_not_installed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda _: None)
    Path("model/weights.gguf").touch()
    assert failures(check_offline(settings)) == []
    wants = changed(settings, "model", gguf_file="weights.gguf", lora=LoraSettings(rank=4))
    assert failures(check_offline(wants)) == [
        "model.lora.rank=4 needs the module peft; pip install 'stream-trainer[lora]'",
        "model.gguf_file=weights.gguf needs the module gguf, accelerate; pip install 'stream-trainer[gguf]'",
    ]


def test_a_gguf_file_that_is_not_in_the_directory(settings: Settings) -> None:
    (line,) = failures(check_offline(changed(settings, "model", gguf_file="none.gguf")))
    assert line.startswith("model.gguf_file=model/none.gguf cannot be read")


def test_a_port_in_use(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (line,) = failures(check_all(changed(settings, "server", port=port)))
        assert line.startswith(f"server.port={port} cannot be listened on")
        assert failures(check_all(changed(settings, "server", port=port, enabled=False))) == []


def test_brokers_that_are_not_there(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    kafka = settings.source.kafka.model_copy(
        update={"topic": "samples", "bootstrap_servers": address, "bootstrap_timeout_s": 0.5}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # kafka-python leaves the sockets that did not connect open
        (line,) = failures(check_all(changed(settings, "source", kind="kafka", kafka=kafka)))
        gc.collect()
    assert line.startswith(f"source.kafka.bootstrap_servers={address} could not be reached")
    assert "\n" not in line


def test_certificates_are_looked_for(settings: Settings) -> None:
    kafka = settings.source.kafka.model_copy(update={"topic": "samples", "ssl_cafile": Path("ca.pem")})
    (line,) = failures(check_offline(changed(settings, "source", kind="kafka", kafka=kafka)))
    assert line.startswith("source.kafka.ssl_cafile=ca.pem cannot be read")
