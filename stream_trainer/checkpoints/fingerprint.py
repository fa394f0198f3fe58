"""What a run is made with, in a checkpoint, so that a resume can tell what has changed since.

A fingerprint is flat: a name and a value that people can read, or a digest where that would be long. It holds settings
that decide what is learned, contents of the files they name, model, tokenizer, processor and versions; no secrets, for
of the source it has the stream's name alone.
"""

import hashlib
import json
import logging
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from stream_trainer.errors import CheckpointError, SettingsError
from stream_trainer.formats.files import LINES, form_of, main_file
from stream_trainer.models.loading import LoadedModel
from stream_trainer.records import Partition
from stream_trainer.settings.base import Section
from stream_trainer.settings.schema import Settings
from stream_trainer.settings.sections.source import SourceSettings

# With another one of these the run would be wrong; with another of the rest it is another run.
REFUSED = ("model.config", "model.parameters", "model.tokenizer_contents", "source.jsonl.contents")

TARGET_CONTENTS = "target.path_contents"
LOOKED_AT_BYTES = 1024 * 1024  # at either end of what was read of a file
_NUMBERS = 16  # leading numbers of each parameter by which a model is known again

logger = logging.getLogger(__name__)


def fingerprint_of(settings: Settings, loaded: LoadedModel, version: str) -> dict[str, Any]:
    """To be taken before a checkpoint is restored into the model. Raises OSError if a file cannot be read."""
    sections = ("model", "target", "selection", "optimizer", "memory", "samples", "buffer")
    found = {key: value for name in sections for key, value in _flat(name, getattr(settings, name))}
    found |= {"training.seed": settings.training.seed} | _source(settings.source) | _model(settings, loaded)
    found["processor.kind"] = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    found["processor.threads"] = torch.get_num_threads()
    if loaded.device.type == "cuda":
        found["processor.device"] = torch.cuda.get_device_name(loaded.device)
    found |= {"versions.torch": torch.__version__, "versions.transformers": transformers.__version__}
    found["versions.stream_trainer"] = version
    read_back: dict[str, Any] = json.loads(json.dumps(found))
    return read_back


def consumed(source: SourceSettings, cursor: Mapping[str, Any]) -> dict[str, str]:
    """A digest of what lies before the cursor of a file, both ends of it; empty for all other sources.

    Nothing else tells a file from another of its name. One that is shorter now is for the source to report.
    """
    if source.kind != "jsonl" or source.jsonl.path in (None, "-"):
        return {}
    path = Path(os.path.abspath(source.jsonl.path or ""))
    log = cursor["partitions"].get(str(Partition(str(path), 0)))
    try:
        file = main_file(path)
        if log is None or not file.is_file():
            return {}
        # A file of another format does not grow, and its cursor counts records.
        is_lines = form_of(path, f"source.jsonl.path={source.jsonl.path}") == LINES
        size = log["next"] if is_lines else file.stat().st_size
        if file.stat().st_size < size:
            return {}
        with file.open("rb") as content:
            ends = content.read(min(LOOKED_AT_BYTES, size))
            content.seek(max(0, size - LOOKED_AT_BYTES))
            ends += content.read(min(LOOKED_AT_BYTES, size))
    except (OSError, SettingsError):
        return {}
    return {"source.jsonl.contents": hashlib.sha256(ends).hexdigest()}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names whose values differ; what only one of the two knows says nothing."""
    return sorted(name for name in then.keys() & now.keys() if then[name] != now[name])


def check_resume(
    path: Path, then: Mapping[str, Any], now: Mapping[str, Any], on_mismatch: Literal["fail", "accept"]
) -> list[str]:
    """Report in one block what differs from when the checkpoint at `path` was made; returns the names.

    Raises CheckpointError if the run would be wrong, unless that is accepted.
    """
    names = differences(then, now)
    if names:
        logger.warning("checkpoint %s was made otherwise; what differs, then and now:", path)
    for name in names:
        logger.warning("  %s", change_of(name, then, now))
    wrong = [name for name in names if name in REFUSED]
    if wrong and on_mismatch == "fail":
        changes = "; ".join(f"{name} was {_short(then[name])}, now {_short(now[name])}" for name in wrong)
        raise CheckpointError(
            f"checkpoint {path} does not go with what is there now ({changes}); restore that, set another "
            "checkpoint.dir, or set checkpoint.on_mismatch=accept"
        )
    return names


def change_of(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How one value has changed, in short."""
    return f"{name}: {_short(then[name])}, now {_short(now[name])}"


def _flat(prefix: str, section: Section) -> Iterator[tuple[str, Any]]:
    for name in type(section).model_fields:
        value, key = getattr(section, name), f"{prefix}.{name}"
        if isinstance(value, Section):
            yield from _flat(key, value)
        elif isinstance(value, Path):
            yield f"{key}_contents", digest_of_file(value)  # wherever it lies
        elif isinstance(value, Mapping):
            yield key, _digest(value)  # what users put in there is theirs
        else:
            yield key, value


def _source(source: SourceSettings) -> dict[str, Any]:
    if source.kind == "kafka":
        kafka = source.kafka
        return {"source.kind": "kafka", "source.kafka.topic": kafka.topic, "source.kafka.format": kafka.format}
    return {"source.kind": "jsonl", "source.jsonl.path": source.jsonl.path}


def _model(settings: Settings, loaded: LoadedModel) -> dict[str, Any]:
    """Contents of what `model` names, which may lie elsewhere now, or be something else under the same name."""
    tokenizer = loaded.tokenizer
    vocabulary = [sorted(tokenizer.get_vocab().items()), tokenizer.all_special_ids]
    config = loaded.config.to_diff_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    return {
        "model.parameters": _digest_of_parameters(loaded.model, numbers=settings.model.name is not None),
        "model.architecture": _digest(config),
        "model.tokenizer_contents": _digest(vocabulary),
        "model.chat_template": _digest(tokenizer.chat_template),
    }


def _digest_of_parameters(model: torch.nn.Module, numbers: bool) -> str:
    """Without adapters. Random numbers, by which a model from `model.config` begins, are those of the seed."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        digest.update(f"{plain} {tuple(parameter.shape)}\n".encode())
        if numbers:
            digest.update(parameter.data.flatten()[:_NUMBERS].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def digest_of_file(path: Path) -> str | None:
    """Of what a file holds; None for what is none. Raises OSError."""
    if not main_file(path).is_file():
        return None  # a pipe gives what it holds only once
    with main_file(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(value: Any) -> str:
    """A digest by its beginning."""
    text = str(value)
    return text[:12] if len(text) == 64 and all(letter in "0123456789abcdef" for letter in text) else text
