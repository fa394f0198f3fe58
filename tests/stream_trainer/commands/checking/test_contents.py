"""What is named holds what it should, and what the hub knows, asked of a stand-in."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from stream_trainer.commands.checking.contents import on_the_hub, samples_in, stream_file, weights_in
from stream_trainer.commands.checking.result import Check
from stream_trainer.settings.schema import ModelSettings, SampleSettings
from tests.stream_trainer.formats.writing import FORMS, REFUSED, write

ROWS = [{"text": f"stone {number}"} for number in range(5)]
SMALL = SampleSettings(max_bytes=1000)


def test_samples_by_the_producers_names_are_samples(tmp_path: Path) -> None:
    """As the run itself reads them: it makes this check at its start, and would refuse its own target."""
    path = tmp_path / "target.jsonl"
    path.write_text('{"instruction": "Say a.", "output": "a", "label": 1}\n')
    mapped = SampleSettings(fields={"prompt": "instruction", "response": "output"}, ignore=("label",))
    assert samples_in("target.path", path, 64, mapped).ok
    assert not samples_in("target.path", path, 64, SampleSettings()).ok


@pytest.mark.parametrize("form", FORMS)
def test_samples_in_any_format(form: str, tmp_path: Path) -> None:
    path = write(form, tmp_path, ROWS)
    assert samples_in("target.path", path, 3, SMALL) == Check("target.path", True, f"{path}, 3 samples")
    assert stream_file(path).ok


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no samples; add at least one line"),
        (b"\n \n", "holds no samples"),
        (b'{"text": "a"}\n\n{"txt": "planted"}\n', "line 3 is not a sample (missing_fields: "),
        (b"prompt,response\n", "line 1 is not a sample (bad_json: "),
        (b"PK\x03\x04", "is a zip archive"),
    ],
)
def test_a_target_that_run_would_refuse(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "target.jsonl"
    path.write_bytes(content)
    found = samples_in("target.path", path, 64, SMALL)
    assert not found.ok
    assert found.detail.startswith(f"target.path={path} ")
    assert words in found.detail
    assert "planted" not in found.detail


@pytest.mark.parametrize("kind", ["zip", "cut gzip", "cut utf-16"])
def test_a_stream_that_run_would_refuse(kind: str, tmp_path: Path) -> None:
    content, words = REFUSED[kind]
    (tmp_path / "x").write_bytes(content)
    found = stream_file(tmp_path / "x")
    assert not found.ok
    assert words in found.detail


def test_a_model_without_all_of_its_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "holds no weights" in weights_in("model.name", tmp_path).detail
    (tmp_path / "a-1.safetensors").touch()
    assert weights_in("model.name", tmp_path).ok
    index = {"weight_map": {"x": "a-1.safetensors", "y": "a-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks a-2.safetensors, which model.safetensors.index.json names" in weights_in("m", tmp_path).detail
    (tmp_path / "a-2.safetensors").touch()
    assert weights_in("model.name", tmp_path).ok
    (tmp_path / "config.json").unlink()
    assert "has no config.json" in weights_in("model.name", tmp_path).detail


@contextmanager
def hub(answers: dict[str, tuple[int, dict[str, str], Any]]) -> Iterator[str]:
    """Answers by name of the model; everything else is not found, as the hub says that."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.partition("?")[0].removeprefix("/api/models/")
            status, headers, body = answers.get(name, (404, {"X-Error-Code": "RepoNotFound"}, {"error": "none"}))
            content = json.dumps(body).encode()
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def known(*files: str) -> tuple[int, dict[str, str], Any]:
    return 200, {}, {"id": "x", "siblings": [{"rfilename": file} for file in files]}


def test_names_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    gated = (403, {"X-Error-Code": "GatedRepo"}, {"error": "gated"})
    revision = (404, {"X-Error-Code": "RevisionNotFound"}, {"error": "none"})
    answers = {
        "me/whole": known("config.json", "model.safetensors"),
        "me/empty": known("README.md"),
        "me/gated": gated,
        "me/whole/revision/v9": revision,
    }
    with hub(answers) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)

        def said(**model: Any) -> list[tuple[bool, str]]:
            settings = ModelSettings(**{"tokenizer": "bytes"} | model)
            return [(check.ok, check.detail) for check in on_the_hub(settings)]

        assert said(name="me/whole") == [(True, "me/whole is on the hub")]
        assert [ok for ok, _ in said(name="me/whole", tokenizer="me/empty")] == [True, True]
        for name, words in {
            "me/none": "model.name=me/none is not on the hub",
            "me/empty": "model.name=me/empty holds no weights",
            "me/gated": "only by those who were let in",
        }.items():
            ((ok, line),) = said(name=name)
            assert not ok
            assert words in line
        ((ok, line),) = said(name="me/whole", revision="v9")
        assert not ok
        assert "no revision v9" in line
    ((ok, line),) = said(name="me/whole")
    assert ok, "a hub that is away says nothing"
    assert "cannot be asked" in line
    assert said(config={"model_type": "llama"}) == []
