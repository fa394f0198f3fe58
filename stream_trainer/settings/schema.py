"""Every setting of the service, documented once: name, unit, default and meaning.

Values come from a YAML file, then the environment (`STREAM_TRAINER_SOURCE__KAFKA__TOPIC=...`), then the command line
(`--source.kafka.topic=...`); the later wins. `loading` reads them and turns every mistake into one line.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from stream_trainer.settings.base import Count, NonNegative, Positive, Section, Share
from stream_trainer.settings.sections.control import ControlSettings
from stream_trainer.settings.sections.distributed import DistributedSettings, why_not_shared
from stream_trainer.settings.sections.ledger import LedgerSettings
from stream_trainer.settings.sections.publish import PublishSettings, StoreUrl, TrackingSettings
from stream_trainer.settings.sections.samples import SampleSettings as SampleSettings
from stream_trainer.settings.sections.selection import TARGET_PROFILES, SelectionSettings, set_by_profile
from stream_trainer.settings.sections.source import SourceSettings

ENVIRONMENT_PREFIX = "STREAM_TRAINER_"


class BufferSettings(Section):
    """Samples between the stream and the trainer. Reading pauses when one of the limits is reached."""

    max_records: Count = 512
    """Maximum number of samples in the buffer."""
    max_bytes: Count = 64 * 1024 * 1024
    """Maximum bytes of record values in the buffer."""
    max_tokens: Count = 1_000_000
    """Maximum number of tokens in the buffer."""
    wait_s: NonNegative = 10.0
    """Seconds that a step waits for a full pool. After that it takes the samples that have come."""


class DeadLetterSettings(Section):
    """Where unusable records go, with their original bytes, headers and position, and the reason."""

    kind: Literal["file", "topic"] = "file"
    """`file` appends JSON lines; `topic` publishes to Kafka, at the source's brokers."""
    path: Path = Path("dead-letters.jsonl")
    """File to append to when `kind` is `file`."""
    topic: Annotated[str, Field(pattern=r"^[a-zA-Z0-9._-]{1,249}$")] | None = None
    """Topic to publish to when `kind` is `topic`. When unset: the source's topic with `.dead-letters` appended."""
    max_bytes: Count | None = None
    """Size at which the file is put aside as `path.1`, `path.2` and so on, and a new one is begun. When unset, it grows
    without bound."""
    keep: Count = 10
    """Number of files put aside that are kept. The oldest are deleted."""
    max_ratio: Annotated[float, Field(gt=0, le=1)] | None = 0.9
    """Largest share of unusable records among the last `window` records of each partition, all partitions taken
    together. If it is more, the run ends with exit code 8. Needs at least `window` records. `null`: no limit."""
    max_in_a_row: Count | None = 1000
    """Number of unusable records in a row that ends the run, with exit code 8. It is counted for each partition, and
    added up. `null`: no limit."""
    window: Count = 1000
    """Number of each partition's last records that these two limits look at."""

    @model_validator(mode="after")
    def _row_fits_the_window(self) -> Self:
        if self.max_in_a_row is not None and self.max_in_a_row > self.window:
            raise ValueError(f"max_in_a_row={self.max_in_a_row} is more than window={self.window}; raise window")
        return self


class LoraSettings(Section):
    """Low-rank adapters. Only the adapters are trained (needs the `lora` extra)."""

    rank: Count = 8
    """Rank r of each adapter."""
    alpha: Positive = 16.0
    """Scaling factor: the adapter's output is multiplied by alpha / rank."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the modules to adapt, or `all-linear`."""
    base: Literal["float32", "bfloat16", "nf4"] = "float32"
    """How the frozen model is held; adapters and their moments are float32 always. `bfloat16` takes 2 bytes a weight
    instead of 4, `nf4` about half a byte for its linear layers (needs the `quantised` extra). Checkpoints then hold the
    adapters alone, as PEFT saves them."""


class ModelSettings(Section):
    """The model to train: a causal language model of transformers."""

    name: str | None = None
    """Directory or hub name of the model. Exactly one of `name` and `config` must be given."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    gguf_file: str | None = None
    """GGUF file inside `name` to load the parameters from (needs the `gguf` extra)."""
    config: dict[str, Any] | None = None
    """Build a model with random parameters from this transformers configuration (`model_type` and its fields)."""
    tokenizer: str | None = None
    """Directory or hub name of the tokenizer, or `bytes` for the built-in byte-level one. When unset: as `name`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the passes. `bfloat16` keeps float32 parameters and runs the passes under bf16 autocast. On a CPU
    without instructions for bfloat16 (AVX-512, AMX) they run in float32, which is much faster there."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Leave it off unless you have read that code."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that stay as they are, such as `model.embed_tokens.*` or `*.mlp.gate.weight`. `*` stands
    for anything. A pattern that matches no trained parameter is refused."""
    lora: LoraSettings | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.name is None) == (self.config is None):
            given = "neither is" if self.name is None else "both are"
            raise ValueError(f"exactly one of name and config must be set, {given}; set name to a model directory")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config needs model_type, for example llama; add it")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("config needs tokenizer; set it to bytes or to a tokenizer directory")
        if self.gguf_file is not None and self.name is None:
            raise ValueError(f"gguf_file={self.gguf_file} needs name, the directory that holds it; set name")
        if self.gguf_file is not None and (Path(self.gguf_file).is_absolute() or ".." in Path(self.gguf_file).parts):
            raise ValueError(f"gguf_file={self.gguf_file} leads out of its directory; name a file inside it")
        return self

    @model_validator(mode="after")
    def _base_can_be_held(self) -> Self:
        base = self.lora.base if self.lora is not None else "float32"
        if base == "bfloat16" and self.dtype != "bfloat16":
            raise ValueError("lora.base=bfloat16 needs dtype=bfloat16, for it cannot run in float32; set dtype")
        if base == "nf4" and (self.name is None or self.gguf_file is not None):
            given = "config" if self.name is None else "gguf_file"
            raise ValueError(f"lora.base=nf4 quantises as it loads, not with {given}; set name to a model directory")
        return self


class TargetSettings(Section):
    """What the model should get better at."""

    path: Path
    """JSONL file of target samples in the stream's format. They steer the selection and are never trained on."""
    topic: Annotated[str, Field(pattern=r"^[a-zA-Z0-9._-]{1,249}$")] | None = None
    """Compacted topic that holds the target, at the source's brokers. The key names a sample, a null value removes it.
    `path` is then the file that the target is kept in. What changes in the topic takes over between two steps."""
    max_samples: Count = 64
    """Samples used, from the top of the file."""
    held_back: Annotated[int, Field(ge=0)] = 0
    """Of these samples the last so many steer nothing: `selection.advantage.shadow_every` measures effects on them."""
    watch: bool = False
    """Look every 5 seconds whether the file is another one, and go on with that if it can be used."""
    refresh_steps: Count = 4
    """Steps between refreshes of the target's gradient; 1 refreshes it at every step. With `draw: learned` or `auto`,
    every probe refreshes it."""
    refresh_samples: Count = 4
    """Samples of each refresh, taken in turn from the target samples; all of them if there are no more."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.8
    """Decay of the moving average of the target's gradient, when a refresh takes only some of the target samples."""


class OptimizerSettings(Section):
    """AdamW and its learning rate."""

    learning_rate: Positive = 2e-5
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: Positive = 1e-8
    """Added to the square root of the second moment."""
    moments: Literal["float32", "int8"] = "float32"
    """How Adam's two moments are held: 8 bytes a weight, or 2 (`int8`, in blocks with a scale each; needs the
    `quantised` extra). Parameters of fewer than 4,096 weights keep float32."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay; never applied to biases and norms."""
    clip_norm: Positive | None = 1.0
    """Maximum norm of the update's gradient. A longer one is scaled down to it."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up. `linear` and `cosine` fall to `final_share` over `decay_steps`."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps in which the learning rate rises from zero."""
    decay_steps: Count | None = None
    """Length of the decay after the warm-up, in steps. Required by `linear` and `cosine`."""
    final_share: Share = 0.1
    """Share of the peak that remains after the decay. A stream has no end, so it should not be zero."""

    @model_validator(mode="after")
    def _decay_has_a_length(self) -> Self:
        if self.schedule != "constant" and self.decay_steps is None:
            raise ValueError(f"schedule={self.schedule} needs decay_steps; set the length of the decay")
        return self


class TrainingSettings(Section):
    """The run itself."""

    max_steps: Count | None = None
    """Steps after which the run ends. When unset, there is no limit."""
    seed: int = 0
    """Seed of every random choice."""
    threads: Count | None = None
    """CPU threads of torch. When unset, torch decides."""
    max_dead_steps: Count = 5
    """Steps in a row whose gradient or losses are not finite, after which the run goes back to the weights of its last
    checkpoint. It reads on where it is; the records since then count as discarded."""
    rollback_learning_rate_factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The learning rate is multiplied by this at every such rollback, until another one is set."""
    max_loss_rise: Positive | None = 3.0
    """Nats per token by which the loss on the target set may be above the lowest that an evaluation has found. A model
    beyond it is never saved, and goes back like one that is not finite. `null`: no limit."""


class MemorySettings(Section):
    """What a selecting step may hold beside model and optimizer."""

    factors_gb: NonNegative | None = 4.0
    """Gigabytes of a pool's factors that are kept between scoring and update. Chosen samples beyond it are run again
    for the update, which takes time; 0 keeps nothing, so that memory follows the chosen samples. On several processes
    it is for each of them; with `distributed.mode: fsdp2` all factors of every process are kept, or none of a large
    matrix. Has no effect with `selection.scoring: rank_one`, which keeps all; so does `null`."""


class EvaluationSettings(Section):
    """Loss on fixed sets of samples during training."""

    every_steps: Count = 50
    """Steps between evaluations."""
    retention_path: Path | None = None
    """JSONL file of samples that the model must not forget. Metrics call this set `retention`."""
    sets: dict[str, Path] = Field(default={})
    """More JSONL files to evaluate on, by the names that metrics give these sets."""
    max_samples: Count = 64
    """Samples used from each of these files, from its top."""

    @model_validator(mode="after")
    def _names_are_free(self) -> Self:
        for taken in ("target", *(["retention"] if self.retention_path is not None else [])):
            if taken in self.sets:
                raise ValueError(f"sets.{taken} is the name of another set; choose another name")
        return self


class CheckpointSettings(Section):
    """The durable state: parameters, optimizer, random states and offsets in one atomic directory."""

    dir: Path = Path("checkpoints")
    """Directory of the checkpoints. A run resumes from the newest one that is intact."""
    every_steps: Count = 200
    """Steps between checkpoints."""
    every_seconds: Positive = 900.0
    """Seconds between checkpoints. Whichever of the two limits comes first counts."""
    keep: Annotated[int, Field(ge=2)] = 3
    """Number of checkpoints to keep. At least 2, because the newest may be damaged."""
    asynchronous: bool = False
    """Whether training goes on while a checkpoint is written: a step waits only until weights, moments and state are
    copied. The copy takes as much main memory as these, all the time; page-locked where there is a GPU."""
    max_failing_s: NonNegative = 900.0
    """Seconds that training goes on while checkpoints cannot be written. They are tried again all the while."""
    upload: StoreUrl | None = None
    """Object store to copy each checkpoint to once it is durable here, `s3://bucket/checkpoints`. Of several that wait
    the newest is copied (needs the `upload` extra and the store's client)."""
    on_mismatch: Literal["fail", "accept"] = "fail"
    """If a checkpoint was made with another model, another tokenizer, or another file in the place of the stream: stop
    with the reason (`fail`), or go on from it all the same (`accept`)."""

    @property
    def digits(self) -> str:
        """Tell the directory's path from others: whose letters and offsets are whose."""
        return hashlib.sha256(str(self.dir.resolve()).encode()).hexdigest()[:8]


class ServerSettings(Section):
    """HTTP server with `/metrics`, `/healthz`, `/readyz` and a page for people at `/`."""

    enabled: bool = True
    """Whether the server runs."""
    host: str = "127.0.0.1"
    """Address to listen on; use `0.0.0.0` in a container."""
    port: Annotated[int, Field(ge=0, le=65535)] = 9464
    """Port to listen on. 0 takes a free port and logs it."""
    stall_s: Positive = 600.0
    """Seconds without progress, while there is work to do, after which `/healthz` responds with 503."""
    show_text: bool = False
    """Whether the page shows the beginning of samples. Anyone who can open the page can then read them."""


class LogSettings(Section):
    """Logs go to standard error."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Minimum severity that is logged."""
    format: Literal["text", "json"] = "text"
    """`text` for people, `json` for log collectors: one JSON object a line."""
    progress: Literal["auto", "off", "plain", "live"] = "auto"
    """How `run` shows its progress: `live` in a panel on the terminal, `plain` as a log line from time to time, or
    `off`. `auto` is `live` if standard error is a terminal and `format` is `text`, and `plain` elsewhere."""
    every_s: Positive = 15.0
    """Seconds between plain lines of progress."""

    @model_validator(mode="after")
    def _a_panel_is_text(self) -> Self:
        if self.progress == "live" and self.format == "json":
            raise ValueError("progress=live does not go with format=json; set progress to plain, or format to text")
        return self


class Settings(BaseSettings):
    """Everything that can be set."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        env_prefix=ENVIRONMENT_PREFIX,
        env_nested_delimiter="__",
        use_attribute_docstrings=True,
        hide_input_in_errors=True,
    )

    source: SourceSettings
    model: ModelSettings
    target: TargetSettings
    selection: SelectionSettings = SelectionSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    training: TrainingSettings = TrainingSettings()
    memory: MemorySettings = MemorySettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    ledger: LedgerSettings = LedgerSettings()
    publish: PublishSettings = PublishSettings()
    tracking: TrackingSettings = TrackingSettings()
    samples: SampleSettings = SampleSettings()
    dead_letters: DeadLetterSettings = DeadLetterSettings()
    buffer: BufferSettings = BufferSettings()
    server: ServerSettings = ServerSettings()
    control: ControlSettings = ControlSettings()
    log: LogSettings = LogSettings()
    distributed: DistributedSettings = DistributedSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        *_: PydanticBaseSettingsSource,
        **__: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What is passed in and nothing else: `loading` reads the environment, one line per mistake."""
        return (init_settings,)

    @model_validator(mode="before")
    @classmethod
    def _profile_sets_the_target(cls, given: Any) -> Any:
        target = given.get("target") if isinstance(given, Mapping) else None
        if isinstance(target, TargetSettings):
            target = target.model_dump(exclude_unset=True)
        if not isinstance(target, Mapping):
            return given
        return {**given, "target": {**TARGET_PROFILES[set_by_profile(given.get("selection"))], **target}}

    @model_validator(mode="after")
    def _group_is_that_of_the_directory(self) -> Self:
        object.__setattr__(self, "source", self.source.with_group_of(self.checkpoint.digits))
        return self

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.dead_letters.kind == "topic" and self.source.kind != "kafka":
            raise ValueError(
                f"dead_letters.kind=topic needs source.kind=kafka, not {self.source.kind}; use dead_letters.kind=file"
            )
        if self.target.topic is not None and self.source.kind != "kafka":
            raise ValueError(f"target.topic={self.target.topic} needs source.kind=kafka; use target.path without topic")
        if self.dead_letters.kind == "topic" and self.dead_letters.topic == self.source.kafka.topic:
            raise ValueError(f"dead_letters.topic={self.dead_letters.topic} is the source's topic; name another one")
        if self.optimizer.moments == "int8" and self.selection.mask != "none":
            raise ValueError(
                f"optimizer.moments=int8 does not go with selection.mask={self.selection.mask}, which keeps moments of "
                "unmasked weights only; set optimizer.moments to float32"
            )
        every = self.selection.advantage.shadow_every
        if every is not None and self.target.held_back == 0:
            raise ValueError(
                f"selection.advantage.shadow_every={every} measures on samples held back, and target.held_back is 0; "
                "set it to 8 or more"
            )
        if self.publish.vllm is not None and self.model.lora is None:
            raise ValueError("publish.vllm loads adapters, and there are none; set model.lora, or leave it out")
        if self.distributed.mode != "none" and (why := why_not_shared(self)):
            raise ValueError(f"distributed.mode={self.distributed.mode}: {why}")
        needs, wanted = self.selection.largest_take
        if wanted > self.buffer.max_records:
            raise ValueError(
                f"{needs}={wanted} does not fit buffer.max_records={self.buffer.max_records}; raise buffer.max_records"
            )
        return self
