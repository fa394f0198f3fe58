"""Whether what is named holds what it should: samples, weights, a model on the hub."""

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from stream_trainer.commands.checking.result import Check
from stream_trainer.errors import SampleError, SettingsError
from stream_trainer.formats.files import look, records_in
from stream_trainer.samples.fields import parse_fields
from stream_trainer.samples.others import Others, others_of
from stream_trainer.settings.schema import ModelSettings, SampleSettings

HUB_TIMEOUT_S = 10.0
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def samples_in(name: str, path: Path, limit: int, settings: SampleSettings) -> Check:
    """Whether the first `limit` records of a file that the user keeps are samples, for all that needs no tokenizer."""
    label, found, others = f"{name}={path}", 0, others_of(settings.fields, settings.ignore)
    try:
        for number, value in enumerate(records_in(path, label), start=1):
            if found == limit:
                break
            if not value.strip():
                continue
            found += 1
            if problem := _problem(value, settings.max_bytes, others):
                return Check(name, False, f"{label} line {number} is not a sample ({problem}); correct or remove it")
    except SettingsError as error:
        return Check(name, False, str(error))
    if not found:
        return Check(name, False, f"{label} holds no samples; add at least one line")
    return Check(name, True, f"{path}, {found} samples")


def _problem(value: bytes, max_bytes: int, others: Others) -> str:
    try:
        parse_fields(value, max_bytes, others=others)
    except SampleError as error:
        return f"{error.reason}: {error}"
    return ""


def stream_file(path: Path) -> Check:
    """Whether the file that is trained on is of a format that can be read."""
    try:
        form = look(path, f"source.jsonl.path={path}")
    except SettingsError as error:
        return Check("source.jsonl.path", False, str(error))
    return Check("source.jsonl.path", True, f"{path}, {form}")


def weights_in(name: str, directory: Path) -> Check:
    """Whether a directory holds a configuration, and all the weights that it names."""
    label = f"{name}={directory}"
    if not any(next(directory.glob(pattern), None) for pattern in _WEIGHTS):
        return Check(name, False, f"{label} holds no weights (model.safetensors or the like); name a whole model")
    for index in _INDICES:
        if missing := _missing_shards(directory / index):
            return Check(name, False, f"{label} lacks {missing}, which {index} names; copy the whole model there")
    if not any((directory / file).is_file() for file in ("config.json", "adapter_config.json")):
        return Check(name, False, f"{label} has no config.json; name a whole model, or set model.gguf_file")
    return Check(name, True, f"directory {directory}")


def _missing_shards(index: Path) -> str:
    """The first file that an index names and that is not there; empty if all are."""
    try:
        named = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError):
        return ""  # there is none, or loading it will say what is wrong
    return next((file for file in sorted(named) if not (index.parent / file).is_file()), "")


def on_the_hub(model: ModelSettings) -> Iterator[Check]:
    """Whether names that are no directories are known to the hub, if it can be asked."""
    names = {"model.name": model.name, "model.tokenizer": model.tokenizer}
    for setting, value in names.items():
        if value not in (None, "bytes") and not Path(str(value)).exists():
            yield _known(setting, str(value), model.revision, weights=setting == "model.name")


def _known(setting: str, value: str, revision: str | None, weights: bool) -> Check:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    label = f"{setting}={value}"
    if isinstance(try_to_load_from_cache(value, "config.json", revision=revision), str):
        return Check(setting, True, f"{value} is in the hub's cache")
    try:
        found = HfApi(endpoint=os.environ.get("HF_ENDPOINT")).model_info(
            value, revision=revision, timeout=HUB_TIMEOUT_S
        )
    except GatedRepoError:
        return Check(setting, False, f"{label} may be read only by those who were let in; ask for it, and set HF_TOKEN")
    except RevisionNotFoundError:
        return Check(setting, False, f"{label} has no revision {revision} on the hub; correct model.revision")
    except (RepositoryNotFoundError, HFValidationError):
        return Check(setting, False, f"{label} is not on the hub, or private; correct the name, or set HF_TOKEN")
    except Exception as error:  # there is no network, or the hub is away: only loading tells
        return Check(
            setting, True, f"{value} will be looked up on the hub, which cannot be asked ({type(error).__name__})"
        )
    files = [file.rfilename for file in islice(found.siblings or (), 10_000)]
    if weights and not any(Path(file).match(pattern) for file in files for pattern in _WEIGHTS):
        return Check(setting, False, f"{label} holds no weights on the hub; name a whole model")
    return Check(setting, True, f"{value} is on the hub")
