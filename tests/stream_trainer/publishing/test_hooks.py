"""Commands, servers and stores that hear of a version: what they are given, and what their refusals say."""

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from stream_trainer.errors import SettingsError
from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.publishing.backup import Backup
from stream_trainer.publishing.hooks import HookError, make_hooks
from stream_trainer.publishing.stores import StoreError
from stream_trainer.settings.sections.publish import HubSettings, PublishSettings, VllmSettings
from tests.helpers.publishing import Run, write_checkpoint
from tests.helpers.service import wait_for

Answer = Callable[[str, bytes], tuple[int, Any]]


@contextmanager
def http_server(answer: Answer) -> Iterator[tuple[str, list[tuple[str, str, Any]]]]:
    """A server of one's own: its address, and what it was asked: path, authorization, content."""
    asked: list[tuple[str, str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append((self.path, self.headers.get("Authorization", ""), body))
            status, content = answer(self.path, body)
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_HEAD = do_POST

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def version_in(folder: Path) -> Path:
    with Run(folder) as run:
        run.checkpoint(3)
    return run.versions / "v000001-step-3"


def hooks_of(folder: Path, **settings: Any) -> Any:
    return make_hooks(PublishSettings(dir=folder / "published", **settings))


# The command


def test_a_command_gets_path_and_version_and_no_shell(tmp_path: Path) -> None:
    path, out = version_in(tmp_path), tmp_path / "out"
    code = f"import sys; open({str(out)!r}, 'w').write('|'.join(sys.argv[1:]))"
    words = (sys.executable, "-c", code, "{path}", "at={version}", "$HOME; `id`")
    hooks_of(tmp_path, command=words)["command"](path)
    assert out.read_text() == f"{path}|at=v000001-step-3|$HOME; `id`"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((sys.executable, "-c", "import sys; sys.exit(3)"), "ended with exit code 3"),
        ((sys.executable, "-c", "import time; time.sleep(600)"), "took longer than publish.hook_timeout_s=0.5"),
        (("/no/such/command",), "/no/such/command cannot be run (No such file or directory)"),
    ],
)
def test_a_command_that_fails_says_how(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    hook = hooks_of(tmp_path, command=words, hook_timeout_s=0.5)["command"]
    with pytest.raises(HookError, match=r"publish\.command") as caught:
        hook(tmp_path)
    assert said in str(caught.value)


# vLLM


def test_vllm_is_given_the_adapter(tmp_path: Path) -> None:
    with http_server(lambda _, __: (200, "ok")) as (url, asked):
        vllm = VllmSettings(url=f"{url}/", name="mine", api_key="open sesame")
        hooks_of(tmp_path, vllm=vllm)["vllm"](tmp_path / "v000001-step-3")
    (page, key, body), *others = asked
    assert not others
    assert (page, key) == ("/v1/load_lora_adapter", "Bearer open sesame")
    path = str(tmp_path / "v000001-step-3" / "adapter")
    assert json.loads(body) == {"lora_name": "mine", "lora_path": path, "load_inplace": True}


def test_a_vllm_that_cannot_replace_an_adapter_unloads_it_first(tmp_path: Path) -> None:
    loaded = ["stream-trainer"]

    def answer(path: str, body: bytes) -> tuple[int, Any]:
        name = json.loads(body)["lora_name"]
        if path == "/v1/unload_lora_adapter":
            loaded.remove(name)
        elif name in loaded:
            return 400, {"message": f"The lora adapter '{name}' has already been loaded."}
        else:
            loaded.append(name)
        return 200, "ok"

    with http_server(answer) as (url, asked):
        hooks_of(tmp_path, vllm=VllmSettings(url=url))["vllm"](tmp_path)
    assert [page.rpartition("/")[2] for page, _, _ in asked] == [
        "load_lora_adapter",
        "unload_lora_adapter",
        "load_lora_adapter",
    ]
    assert loaded == ["stream-trainer"]


def test_a_vllm_that_refuses_or_is_away_says_so_without_the_key(tmp_path: Path) -> None:
    with http_server(lambda _, __: (404, {"message": "no adapter\nthere"})) as (url, _):
        hook = hooks_of(tmp_path, vllm=VllmSettings(url=url, api_key="open sesame"))["vllm"]
        with pytest.raises(HookError, match=r"answered 404: .*no adapter") as caught:
            hook(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(HookError, match=f"publish.vllm.url={url}: /v1/load_lora_adapter failed") as caught:
        hook(tmp_path)  # it is gone now
    assert "sesame" not in str(caught.value)


# Stores


def test_a_version_is_copied_to_a_store_and_is_whole_where_its_last_file_is(tmp_path: Path) -> None:
    import fsspec

    path, memory = version_in(tmp_path), fsspec.filesystem("memory")
    hooks_of(tmp_path, upload="memory://bucket/models")["upload"](path)
    files = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    copied = memory.find("/bucket/models/v000001-step-3", detail=True)
    assert {name.removeprefix("/bucket/models/v000001-step-3/") for name in copied} == files
    for name in files:
        assert memory.cat_file(f"/bucket/models/v000001-step-3/{name}") == (path / name).read_bytes()
    assert memory.cat_file("/bucket/models/current") == b"v000001-step-3\n"
    newest = max(copied, key=lambda name: copied[name]["created"])
    assert newest.endswith("/version.json")
    memory.rm("/bucket", recursive=True)


def test_a_store_that_refuses_says_so(tmp_path: Path) -> None:
    path = version_in(tmp_path)
    (tmp_path / "taken").write_text("a file in the place of the directory")
    with pytest.raises(StoreError, match=r"publish.upload=file://.*: the upload of v000001-step-3 failed"):
        hooks_of(tmp_path, upload=f"file://{tmp_path}/taken")["upload"](path)


def test_a_store_without_its_client_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"needs the store's own client") as caught:
        hooks_of(tmp_path, upload="gs://bucket/models")
    assert "\n" not in str(caught.value)


def test_a_version_is_a_commit_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that answers as the Hub does; files are small enough to travel within the commit."""
    path = version_in(tmp_path)
    committed: list[dict[str, Any]] = []

    def answer(page: str, body: bytes) -> tuple[int, Any]:
        if page == "/api/repos/create":
            return 200, {"url": "http://127.0.0.1/me/model", "name": "me/model"}
        if "/preupload/" in page:
            files = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if "/commit/" in page:
            committed.extend(json.loads(line) for line in body.splitlines())
            return 200, {"commitUrl": "http://127.0.0.1/me/model/commit/abc", "commitOid": "abc"}
        if "/tree/" in page:
            return 200, []
        return 200, {"valid": True, "id": "me/model", "siblings": [], "sha": "abc", "tags": [], "private": True}

    with http_server(answer) as (url, asked):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        hub = HubSettings(repo="me/model", token="hf_secret")
        hooks_of(tmp_path, hub=hub)["hub"](path)
    created = json.loads(next(body for page, _, body in asked if page == "/api/repos/create"))
    assert created.get("private") or created.get("visibility") == "private", created
    # Once a day the client asks for a list of its own, without a key.
    assert {page for page, key, _ in asked if key != "Bearer hf_secret"} <= {"/api/agent-harnesses"}
    header = next(line["value"] for line in committed if line["key"] == "header")
    assert header["summary"] == "v000001-step-3, step 3"
    names = {line["value"]["path"] for line in committed if line["key"] == "file"}
    assert names == {"README.md", "config.json", "model.safetensors", "version.json"}


def test_a_hub_that_is_away_says_so_without_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = version_in(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with http_server(lambda _, __: (401, {"error": "Invalid credentials"})) as (url, _):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        hub = HubSettings(repo="me/model", token="hf_secret")
        with pytest.raises(StoreError, match=r"publish\.hub\.repo=me/model: the upload of v000001-step-3") as caught:
            hooks_of(tmp_path, hub=hub)["hub"](path)
    assert "hf_secret" not in str(caught.value)


# Checkpoints


def test_checkpoints_are_copied_with_their_manifest_last_and_a_failure_degrades(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.write_text("a file in the place of the directory")
    metrics = Metrics()

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"stream_trainer_{name}", labels)

    backup = Backup(f"file://{store}", metrics)
    assert backup.watcher.on_checkpoint is not None
    backup.watcher.on_checkpoint(1, write_checkpoint(tmp_path / "checkpoints", 1))
    wait_for(lambda: value("checkpoint_upload_failures_total") == 1)
    wait_for(lambda: value("degraded", cause="upload") == 1)
    store.unlink()
    path = write_checkpoint(tmp_path / "checkpoints", 2)
    backup.watcher.on_checkpoint(2, path)
    backup.end(None)
    copy = store / path.name
    assert {f.relative_to(copy): f.read_bytes() for f in copy.rglob("*") if f.is_file()} == {
        f.relative_to(path): f.read_bytes() for f in path.rglob("*") if f.is_file()
    }
    assert max(os.stat(f).st_mtime_ns for f in copy.rglob("*")) == (copy / "manifest.json").stat().st_mtime_ns
    assert value("checkpoint_upload_step") == 2
    assert value("degraded", cause="upload") == 0
