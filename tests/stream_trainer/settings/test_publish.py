"""Settings of what goes out of a run."""

import pytest

from stream_trainer.errors import SettingsError
from stream_trainer.settings.help import show
from stream_trainer.settings.loading import load_settings

BASE = ["--source.kafka.topic=samples", "--model.name=model", "--target.path=target.jsonl"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--publish.upload=s3://b/m"], "publish.upload needs publish.dir, the directory of the versions; set it"),
        (["--publish.dir=d", "--publish.upload=bucket/m"], "publish.upload=bucket/m (command line) does not match"),
        (["--publish.dir=d", "--publish.upload=ftp://me:sesame@host/m"], "publish.upload: takes no user or password"),
        (["--checkpoint.upload=ftp://me:sesame@host/m"], "checkpoint.upload: takes no user or password"),
        (["--publish.dir=d", "--publish.keep=1"], "publish.keep=1 (command line) must be at least 2; raise it"),
        (["--publish.dir=d", "--publish.command=[reload, '{model}']"], "publish.command has {model}"),
        (["--publish.dir=d", "--publish.vllm.url=http://v:8000"], "publish.vllm loads adapters, and there are none"),
        (["--publish.dir=d", "--publish.hub.repo=a b", "--publish.hub.token=sesame"], "publish.hub.repo="),
        (["--tracking.report_to=[tensorbord]"], "tracking.report_to"),
        (["--tracking.otlp_url=collector:4318"], "tracking.otlp_url=collector:4318 (command line) does not match"),
    ],
)
def test_a_mistake_is_one_line_without_a_secret(options: list[str], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(None, BASE + options)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)
    assert "sesame" not in str(caught.value)


def test_secrets_come_from_the_environment_and_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAM_TRAINER_PUBLISH__HUB__TOKEN", "sesame")
    monkeypatch.setenv("STREAM_TRAINER_PUBLISH__VLLM__API_KEY", "sesame")
    options = ["--publish.dir=d", "--publish.hub.repo=me/model", "--publish.vllm.url=http://v:8000", "--model.lora={}"]
    settings = load_settings(None, BASE + options)
    hub, vllm = settings.publish.hub, settings.publish.vllm
    assert hub is not None
    assert hub.token is not None
    assert hub.token.get_secret_value() == "sesame"
    assert vllm is not None
    assert vllm.api_key is not None
    assert "sesame" not in show(settings)
    assert "sesame" not in repr(settings)
