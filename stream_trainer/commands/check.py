"""Whether what the settings name is there: looked at before anything is loaded, and by `config check`."""

import os
import re
import shutil
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from stream_trainer.checkpoints.trouble import try_out
from stream_trainer.commands.checking.contents import on_the_hub, samples_in, stream_file, weights_in
from stream_trainer.commands.checking.result import Check
from stream_trainer.commands.checking.space import nearest, room, space
from stream_trainer.errors import SettingsError, StreamTrainerError
from stream_trainer.monitoring.server import listen_problem
from stream_trainer.settings.schema import ModelSettings, Settings
from stream_trainer.settings.sections.selection import SelectionSettings
from stream_trainer.settings.sections.source import KafkaSettings

# What the hub accepts, and no path on disk that a user would mean: `name` or `owner/name`.
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def check_all(settings: Settings) -> list[Check]:
    """Everything: what `check_offline` looks at, then memory and disk, the hub, the port and the brokers."""
    found = [*check_offline(settings), *space(settings), *on_the_hub(settings.model)]
    return [*found, *_server(settings), *_kafka(settings)]


def check_offline(settings: Settings) -> list[Check]:
    """What this machine alone can tell, in milliseconds (longer where a CUDA device must be looked for)."""
    return [
        *_files(settings),
        *_directories(settings),
        *_own_selector(settings.selection),
        *_model(settings.model),
        *_extras(settings),
        *_schema_extra(settings),
        *_security(settings),
        _device(settings.model),
    ]


def require(checks: list[Check]) -> None:
    """Raise SettingsError with one line for each check that failed."""
    failed = dict.fromkeys(check.detail for check in checks if not check.ok)  # two may hit upon the same
    if failed:
        raise SettingsError("\n".join(failed))


def _files(settings: Settings) -> Iterator[Check]:
    named: dict[str, Path | None] = {
        "target.path": settings.target.path if settings.target.topic is None else None,
        "evaluation.retention_path": settings.evaluation.retention_path,
        "selection.mask_path": settings.selection.mask_path,
    }
    named |= {f"evaluation.sets.{name}": path for name, path in settings.evaluation.sets.items()}
    dual_sft = settings.selection.dual_sft
    if settings.selection.mask == "dual_sft":
        named["selection.dual_sft.anchor_path"] = dual_sft.anchor_path
    if settings.source.kind == "jsonl" and settings.source.jsonl.path != "-":
        named["source.jsonl.path"] = Path(settings.source.jsonl.path or "")
    limits = {"target.path": settings.target.max_samples, "selection.dual_sft.anchor_path": dual_sft.anchors}
    for name, path in named.items():
        if path is None:
            continue
        readable = _readable(name, path)
        if not readable.ok or name == "selection.mask_path" or not (path.is_file() or path.is_dir()):
            yield readable  # a pipe gives what it holds only once
        elif name == "source.jsonl.path":
            yield stream_file(path)
        else:
            limit = limits.get(name, settings.evaluation.max_samples)
            yield samples_in(name, path, limit, settings.samples)


def _security(settings: Settings) -> Iterator[Check]:
    """Whether the files for TLS and SASL fit; only where there are any, for it loads the Kafka client."""
    kafka = settings.source.kafka
    names = ("ssl_cafile", "ssl_certfile", "ssl_keyfile", "ssl_password_file", "sasl_password_file", "sasl_token_file")
    if settings.source.kind != "kafka" or all(getattr(kafka, name) is None for name in names):
        return
    from stream_trainer.sources.security import security_options

    try:
        security_options(kafka)
    except SettingsError as error:
        yield Check("source.kafka.security_protocol", ok=False, detail=str(error))
    else:
        yield Check("source.kafka.security_protocol", ok=True, detail=f"{kafka.security_protocol}, its files fit")


def _own_selector(settings: SelectionSettings) -> Iterator[Check]:
    """Only where one is named: it is code of the user's, and needs torch."""
    if ":" not in settings.weigh:
        return
    import torch

    from stream_trainer.training.own_selector import load_selector

    try:
        load_selector(settings, torch.Generator())
    except SettingsError as error:
        yield Check("selection.weigh", ok=False, detail=str(error))
    else:
        yield Check("selection.weigh", ok=True, detail=f"{settings.weigh} can be made")


def _readable(name: str, path: Path) -> Check:
    try:
        if path.is_dir():
            return Check(name, True, str(path))  # perhaps a dataset on disk
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        return Check(name, False, f"{name}={path} cannot be read ({error.strerror}); correct the path")
    return Check(name, True, str(path))


def _directories(settings: Settings) -> Iterator[Check]:
    directory = settings.checkpoint.dir
    writable = _writable("checkpoint.dir", directory, directory)
    yield writable
    if writable.ok:
        yield room(settings)
        yield _mount(directory)
    if (published := settings.publish.dir) is not None:
        yield _writable("publish.dir", published, published)
    if settings.publish.command:
        yield _command(settings.publish.command[0])
    # Also beside a topic: records that are too large for it go to the file.
    path = settings.dead_letters.path
    if path.is_dir():
        yield Check("dead_letters.path", False, f"dead_letters.path={path} is a directory; name a file")
    elif path.exists() and not os.access(path, os.W_OK):
        yield Check("dead_letters.path", False, f"dead_letters.path={path} cannot be written; change its permissions")
    else:
        yield _writable("dead_letters.path", path, path.parent)


def _command(word: str) -> Check:
    if shutil.which(word) is None:
        return Check("publish.command", False, f"publish.command={word} is no command here; correct its first word")
    return Check("publish.command", True, word)


def _writable(name: str, path: Path, directory: Path) -> Check:
    """Whether files can be made in `directory`, which itself is made later if its nearest parent allows that."""
    parent = nearest(directory)
    if not parent.is_dir():
        return Check(name, False, f"{name}={path} cannot be made, {parent} is no directory; name another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        return Check(name, False, f"{name}={path} cannot be written, {parent} is read-only for us; name another place")
    return Check(name, True, str(path))


def _mount(directory: Path) -> Check:
    try:
        flushes = try_out(directory)
    except SettingsError as error:
        return Check("checkpoint mount", False, str(error))
    detail = "renames directories" + ("" if flushes else ", but cannot flush them: a power cut may undo a checkpoint")
    return Check("checkpoint mount", True, detail)


def _model(model: ModelSettings) -> Iterator[Check]:
    if model.name is not None:
        wanted = f"a file {model.gguf_file}" if model.gguf_file else "a model directory"
        origin = _origin("model.name", model.name, wanted)
        is_whole = origin.ok and Path(model.name).is_dir() and model.gguf_file is None
        yield weights_in("model.name", Path(model.name)) if is_whole else origin
        if model.gguf_file is not None and Path(model.name).is_dir():
            yield _readable("model.gguf_file", Path(model.name) / model.gguf_file)
    if model.tokenizer not in (None, "bytes"):
        yield _origin("model.tokenizer", str(model.tokenizer), "a tokenizer directory")


def _origin(name: str, value: str, wanted: str) -> Check:
    """A directory, or what may be a name on the hub: only loading tells whether it is."""
    if Path(value).is_dir():
        return Check(name, True, f"directory {value}")
    if _HUB_NAME.fullmatch(value) and not Path(value).exists():
        return Check(name, True, f"{value} is no directory here, so it will be looked up on the hub")
    return Check(name, False, f"{name}={value} is not a directory; set it to {wanted} or a name on the hub")


def _extras(settings: Settings) -> Iterator[Check]:
    model = settings.model
    if model.lora is not None:
        yield _extra("lora", ("peft",), f"model.lora.rank={model.lora.rank}")
        if model.lora.base == "nf4":
            yield _extra("quantised", ("bitsandbytes", "accelerate"), "model.lora.base=nf4")
    if settings.optimizer.moments == "int8":
        yield _extra("quantised", ("bitsandbytes",), "optimizer.moments=int8")
    if model.gguf_file is not None:
        yield _extra("gguf", ("gguf", "accelerate"), f"model.gguf_file={model.gguf_file}")
    for name in settings.tracking.report_to:
        yield _extra(name, (name,), f"tracking.report_to={name}")
    if settings.ledger.enabled:
        yield _extra("ledger", ("pyarrow",), "ledger.enabled=true")
    if settings.tracking.otlp_url is not None:
        yield _extra("otlp", ("opentelemetry",), f"tracking.otlp_url={settings.tracking.otlp_url}")
    for setting, url in (("publish", settings.publish.upload), ("checkpoint", settings.checkpoint.upload)):
        if url is not None:
            yield _extra("upload", ("fsspec",), f"{setting}.upload={url}")


def _schema_extra(settings: Settings) -> Iterator[Check]:
    if settings.source.kind == "kafka" and settings.source.kafka.format != "json":
        modules = ("confluent_kafka", "authlib", "fastavro", "jsonschema", "google.protobuf")
        yield _extra("schema", modules, f"source.kafka.format={settings.source.kafka.format}")


def _extra(name: str, modules: tuple[str, ...], setting: str) -> Check:
    missing = [module for module in modules if not _is_there(module)]
    if missing:
        line = f"{setting} needs the module {', '.join(missing)}; pip install 'stream-trainer[{name}]'"
        return Check(f"extra {name}", False, line)
    return Check(f"extra {name}", True, "installed")


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # what it is part of is not there
        return False


def _device(model: ModelSettings) -> Check:
    known = re.fullmatch(r"cpu|cuda(?::(\d+))?", model.device)
    if known is None:
        return Check("model.device", False, f"model.device={model.device} is unknown; set it to cpu, cuda or cuda:N")
    if model.device != "cpu":
        import torch  # it takes seconds, which only those pay who ask for a device

        found = torch.cuda.device_count()
        if int(known[1] or 0) >= found:
            line = f"model.device={model.device} is not available, torch sees {found} CUDA devices; set it to cpu"
            return Check("model.device", False, line)
    return Check("model.device", True, model.device)


def _server(settings: Settings) -> Iterator[Check]:
    for name, section in (("server", settings.server), ("control", settings.control)):
        if section.enabled:
            yield _port(name, section.host, section.port)


def _port(name: str, host: str, port: int) -> Check:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return Check(f"{name}.port", False, listen_problem(name, host, port, error))
    return Check(f"{name}.port", True, f"{host}:{port} is free")


def _kafka(settings: Settings) -> Iterator[Check]:
    if settings.source.kind != "kafka":
        return
    yield from _registry(settings.source.kafka)
    from stream_trainer.sources.connection import probe  # kafka is loaded only where it is used

    try:
        probe(settings.source.kafka)
    except StreamTrainerError as error:
        yield Check("source.kafka", False, str(error))
    else:
        yield Check("source.kafka", True, f"{settings.source.kafka.topic} at {settings.source.kafka.bootstrap_servers}")


def _registry(kafka: KafkaSettings) -> Iterator[Check]:
    """Asked as a record would ask it."""
    if kafka.format == "json":
        return
    from stream_trainer.samples.schemas.registry import Registry

    name = "source.kafka.schema_registry"
    try:
        Registry(kafka).probe()
    except StreamTrainerError as error:
        yield Check(name, False, str(error))
    else:
        yield Check(name, True, f"{kafka.schema_registry.url} answers")
