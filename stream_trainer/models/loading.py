"""Load or build the model and its tokenizer.

What is trained is float32 whatever `model.dtype` says: bfloat16 means autocast during the passes. The model stays in
train() mode with every dropout at zero: one pass serves scoring and update, so it must be deterministic, and gradient
checkpointing is active in train() mode only. `saving` writes models and reads them back.
"""

import copy
import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from stream_trainer.errors import SettingsError
from stream_trainer.models.adapters import add_adapters, base_dtype, quantisation
from stream_trainer.models.continued import continued, without_adapter
from stream_trainer.models.ends import end_as_learnt, name_end
from stream_trainer.models.freezing import freeze
from stream_trainer.models.limits import check_vocabulary, longest_text, package_of
from stream_trainer.models.refusals import first_line, install, loading
from stream_trainer.models.stored import (
    becomes_plain,
    check_format,
    forget_format,
    is_packed,
    reading,
    untie,
)
from stream_trainer.samples.byte_tokenizer import byte_tokenizer
from stream_trainer.settings.schema import ModelSettings

logger = logging.getLogger(__name__)

DROPOUT_FIELDS = ("dropout", "pdrop", "layerdrop")  # how the configurations of transformers spell it


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to train.

    Attributes:
        model: in train() mode, on `device`; with LoRA only the adapters require gradients. All of it is float32, but
            for a frozen base that `model.lora.base` has in fewer bits.
        tokenizer: with a padding token.
        autocast_dtype: of the passes, or None for plain float32.
        max_positions: tokens the model can attend to, or None where it knows no limit.
        config: the configuration as the user gave it, with its dropouts; this is what gets saved.
        lora: whether the model carries adapters.
        adapters_only: whether these are all that is saved, for their base is held in fewer bits.
        twin: of a sharded model, the same modules without any weights; else None.
    """

    model: torch.nn.Module
    tokenizer: Any
    device: torch.device
    autocast_dtype: torch.dtype | None
    max_positions: int | None
    config: Any
    lora: bool
    adapters_only: bool
    twin: torch.nn.Module | None = None


def load_model(settings: ModelSettings, seed: int) -> LoadedModel:
    """Load or build the model that `settings` names.

    Random weights follow from `seed` alone, and no global generator is touched.
    Raises SettingsError, in one line, for whatever the user can mend.
    """
    device = _device(settings.device)
    autocast = _autocast(settings, device)
    adapter = continued(settings)
    if adapter is not None:
        adapter.check(settings)
        settings = adapter.below(settings)
    config = _load_config(settings)
    tokenizer = _load_tokenizer(settings, config)
    if settings.config is not None:
        _end_as_tokenizer_does(config, settings.config, tokenizer)
    zeroed = copy.deepcopy(config)
    _zero_dropout(zeroed)
    # Models are built on the CPU, so no other generator takes part.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _build(settings, zeroed, device, base_dtype(settings.lora, autocast))
        check_vocabulary(settings, tokenizer, model)
        if settings.lora is not None:
            model = add_adapters(model, settings)
            if adapter is not None:
                adapter.copy_into(model, settings)
    freeze(model, settings.freeze)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0  # some models hold a dropout that no field of their configuration sets
    end_as_learnt(model, tokenizer)
    model.config.use_cache = False
    if settings.gradient_checkpointing:
        _enable_gradient_checkpointing(model)
    forget_format(config)
    untie(config, model)
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    model.to(device).train()
    _quieten(model)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        device=device,
        autocast_dtype=autocast,
        max_positions=longest_text(config),
        config=config,
        lora=settings.lora is not None,
        adapters_only=settings.lora is not None and settings.lora.base != "float32",
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise SettingsError(f"model.device={name} is unknown; set it to cpu, cuda or cuda:N")
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise SettingsError(f"model.device={name} is not available, torch sees {found} CUDA devices; set it to cpu")
    return device


def _autocast(settings: ModelSettings, device: torch.device) -> torch.dtype | None:
    """Dtype of the passes, or None for plain float32. A base in bfloat16 leaves no choice."""
    dtype = passes_in(settings.dtype, device)
    is_held = settings.lora is not None and settings.lora.base == "bfloat16"
    if dtype != settings.dtype:
        effect = (
            "passes will be slow; set it and model.lora.base to float32"
            if is_held
            else "passes run in float32; set it to float32"
        )
        logger.warning("model.dtype=bfloat16 is not for this processor, which has no instructions for it: %s", effect)
    return torch.bfloat16 if is_held or dtype == "bfloat16" else None


def passes_in(dtype: str, device: torch.device) -> str:
    """What `model.dtype` comes to on a device: `float32` where a CPU has no instructions for bfloat16.

    Emulated, products take far longer than in float32, and are no more exact for it.
    """
    return "float32" if device.type == "cpu" and not _multiplies_bfloat16() else dtype


def _multiplies_bfloat16() -> bool:
    """Whether oneDNN has bfloat16 products for this CPU. torch asks in the same way, and has no public name for it."""
    built_in: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return built_in and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _check_directory(setting: str, name: str) -> None:
    """Refuse early what is clearly meant as a directory, before it is looked up on the hub."""
    if name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir():
        raise SettingsError(f"{setting}={name} is not a directory; correct the path")


def _load_tokenizer(settings: ModelSettings, config: Any) -> Any:
    if settings.tokenizer == "bytes":
        return byte_tokenizer()
    own = settings.tokenizer is not None
    name = str(settings.tokenizer or settings.name)
    setting = "model.tokenizer" if own else "model.name"
    _check_directory(setting, name)
    origin = {} if own else {"revision": settings.revision or "main", "gguf_file": settings.gguf_file}
    _check_tokenizer_package(setting, Path(name))
    remedy = "check its files and the network, or set model.tokenizer"
    with loading(f"{setting}={name}: the tokenizer", remedy):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=settings.trust_remote_code, **origin)
    name_end(tokenizer, config)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise SettingsError(
                f"{setting}={name} has neither a padding nor an end token; set model.tokenizer to another"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_tokenizer_package(setting: str, directory: Path) -> None:
    package = package_of(directory)
    if package is not None and find_spec(package) is None:
        raise SettingsError(
            f"{setting}={directory}: its tokenizer is a tokenizer.model, which the package {package} reads; "
            f"{install(package)}, or put a tokenizer.json beside it"
        )


def _load_config(settings: ModelSettings) -> Any:
    if settings.config is not None:
        return _config_from_fields(settings.config)
    name = str(settings.name)
    _check_directory("model.name", name)
    if settings.gguf_file is not None and Path(name).is_dir() and not (Path(name) / settings.gguf_file).is_file():
        raise SettingsError(f"model.gguf_file={settings.gguf_file} is not in model.name={name}; correct the name")
    with loading(f"model.name={name}", _name_remedy(settings)):
        config = AutoConfig.from_pretrained(name, trust_remote_code=settings.trust_remote_code, **_origin(settings))
    check_format(settings, config)
    return config


def _config_from_fields(fields: dict[str, Any]) -> Any:
    kind = fields["model_type"]
    with loading(f"model.config.model_type={kind}", f"choose one that transformers {transformers.__version__} knows"):
        known = AutoConfig.for_model(kind)
    for name in fields:
        if not hasattr(known, name):
            logger.warning("model.config.%s is not a field of %s: check its spelling", name, kind)
    with loading("model.config", "correct its fields"):
        return AutoConfig.for_model(**fields)


def _end_as_tokenizer_does(config: Any, fields: dict[str, Any], tokenizer: Any) -> None:
    """Let generation begin and end with the tokenizer's own tokens, unless the user named others.

    The padding token is left alone: we never read it from here, and an embedding would freeze its row.
    """
    for name in ("bos_token_id", "eos_token_id"):
        if name not in fields:
            setattr(config, name, getattr(tokenizer, name))


def _origin(settings: ModelSettings) -> dict[str, Any]:
    return {"revision": settings.revision or "main", "gguf_file": settings.gguf_file}


def _name_remedy(settings: ModelSettings) -> str:
    if settings.gguf_file is not None:
        return "set model.gguf_file to a GGUF file of a model that transformers knows"
    if settings.lora is not None and settings.lora.base == "nf4":
        return f"check that bitsandbytes quantises on {settings.device}, or set model.lora.base to bfloat16"
    return "set model.name to a model directory, or check the network and your access to the hub"


def _zero_dropout(config: Any) -> None:
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            _zero_dropout(value)
        elif any(field in name for field in DROPOUT_FIELDS) and isinstance(value, (int, float)):
            setattr(config, name, type(value)(0))


def _quieten(model: torch.nn.Module) -> None:
    """Let routers that add noise while they train compute as they are served; their own flag alone is looked at."""
    for module in model.modules():
        if any("jitter" in name and value for name, value in vars(module).items()):
            module.training = False


def _build(settings: ModelSettings, config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """On the CPU in `dtype`, or quantised on `device`."""
    if settings.config is not None:
        with loading("model.config", "correct its fields"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    is_plain, how = settings.gguf_file is None and not becomes_plain(config), _held(settings, config, device, dtype)
    name = str(settings.name)
    with loading(f"model.name={name}", _name_remedy(settings)), without_adapter(name) as alone:
        model, report = AutoModelForCausalLM.from_pretrained(
            alone,
            config=config,
            dtype=dtype,
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
            **_origin(settings),
            **how,
        )
        if report["missing_keys"]:
            # transformers would give them random values and go on.
            raise SettingsError(
                f"model.name={settings.name} lacks {min(report['missing_keys'])}; set it to a whole model"
            )
        if unread := sorted(report["unexpected_keys"]):
            effect = "they are neither trained nor saved"
            logger.warning(
                "model.name=%s has %d weights that nothing reads (%s): %s", name, len(unread), unread[0], effect
            )
        if is_plain:
            # The weights are mapped from the file, which may be replaced while we train.
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = tensor.data.clone()
            return model
        # A model that was read from fewer bits is marked as quantised, and transformers refuses to save it; the same
        # weights in a model that was never marked are fine.
        forget_format(config)
        plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
        plain.load_state_dict(model.state_dict())
        return plain


def _held(settings: ModelSettings, config: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments by which transformers holds the weights as they are to be held."""
    if becomes_plain(config):
        return reading(config)
    return {"device_map": {"": device}} if is_packed(config) else quantisation(settings.lora, dtype, device)


def _enable_gradient_checkpointing(model: Any) -> None:
    # The name changed within version 5 of transformers; the first argument means the same under both.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise SettingsError(f"model.gradient_checkpointing=true: {first_line(error)}; set it to false") from error
