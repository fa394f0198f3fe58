"""Settings of what goes out of a run: published models, and figures for trackers."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, SecretStr, model_validator

from stream_trainer.settings.base import Count, NonNegative, Positive, Section


def _without_user(url: str) -> str:
    if "@" in url.partition("://")[2].partition("/")[0]:
        raise ValueError(
            "takes no user or password; give them in the environment, as the store's own client reads them"
        )
    return url


StoreUrl = Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]*://.*"), AfterValidator(_without_user)]
HttpUrl = Annotated[str, Field(pattern=r"^https?://[^/]+.*"), AfterValidator(_without_user)]


class VllmSettings(Section):
    """A vLLM server that is to serve the adapter. Needs `model.lora`."""

    url: HttpUrl
    """Address of the server, `http://vllm:8000`. It must see `publish.dir` under the same path, and run with
    `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`."""
    name: str = "stream-trainer"
    """Name under which clients ask for the adapter. It stays the same for all versions."""
    api_key: SecretStr | None = None
    """Key of the server. Set it in the environment rather than in the file."""


class HubSettings(Section):
    """A repository of the Hugging Face Hub, with a commit for each version."""

    repo: Annotated[str, Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")]
    """Its name, `owner/name`. It is made if there is none."""
    private: bool = True
    """Whether a repository that is made is private."""
    token: SecretStr | None = None
    """Token that may write to it. Set it in the environment. When unset, `HF_TOKEN` or the login of this machine."""


class PublishSettings(Section):
    """Models for servers: versions in one directory, each from a durable checkpoint, and a link to the current one."""

    dir: Path | None = None
    """Directory of the published versions. When unset, nothing is published."""
    every_checkpoints: Count = 1
    """Checkpoints between versions. A version that failed or was held back is tried with the next checkpoint."""
    keep: Annotated[int, Field(ge=2)] = 5
    """Number of versions to keep. The current one and pinned ones stay beside them."""
    grace_s: NonNegative = 3600.0
    """Seconds that a version stays after it was the current one, for readers that are still loading it."""
    merged: bool = True
    """With `model.lora`: publish also the whole model, with adapters merged in. Else the adapters alone."""
    max_target_loss_rise: NonNegative | None = 0.1
    """Largest rise of the target's loss over that of the current version, in nats. A version with more is held back.
    `null`: no limit."""
    max_forgetting: NonNegative | None = 0.5
    """Largest rise of any other evaluation set's loss since the start, in nats. A version with more is held back.
    `null`: no limit."""
    upload: StoreUrl | None = None
    """Object store to copy each version to, `s3://bucket/models` (needs the `upload` extra and the store's client)."""
    hub: HubSettings | None = None
    vllm: VllmSettings | None = None
    command: tuple[str, ...] = ()
    """Command to run when a version becomes the current one: a list of words, no shell. `{path}` and `{version}` stand
    for its directory and its name."""
    hook_timeout_s: Positive = 600.0
    """Seconds that the command, or an answer of the vLLM server, may take."""

    @model_validator(mode="after")
    def _hooks_have_versions(self) -> Self:
        if self.dir is None:
            for name in ("upload", "hub", "vllm", "command"):
                if getattr(self, name):
                    raise ValueError(f"publish.{name} needs publish.dir, the directory of the versions; set it")
        for word in self.command:
            if odd := sorted(set(re.findall(r"\{(\w*)\}", word)) - {"path", "version"}):
                raise ValueError(
                    f"publish.command has {{{odd[0]}}}, which stands for nothing; use {{path}} or {{version}}"
                )
        return self


class TrackingSettings(Section):
    """Figures for trackers of experiments, under the names that the metrics have."""

    report_to: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    """Trackers to report to, each an extra of the same name."""
    every_steps: Count = 10
    """Steps between reports. Evaluations are reported always."""
    name: str | None = None
    """Name of the run in these trackers. When unset, they choose one."""
    project: str = "stream-trainer"
    """Experiment of MLflow and project of Weights & Biases that the run belongs to."""
    tensorboard_dir: Path = Path("runs")
    """Directory of TensorBoard's files."""
    mlflow_uri: str | None = None
    """Where MLflow keeps its runs. When unset, `MLFLOW_TRACKING_URI` says so."""
    otlp_url: HttpUrl | None = None
    """OTLP collector to send all metrics to over HTTP, `http://collector:4318/v1/metrics` (needs the `otlp` extra).
    Headers come from `OTEL_EXPORTER_OTLP_HEADERS`."""
    otlp_every_s: Positive = 30.0
    """Seconds between these."""
