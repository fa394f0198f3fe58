"""Load or build the model and its tokenizer.

Weights are float32 whatever `model.dtype` says: bfloat16 means autocast during the passes. The model stays in train()
mode with every dropout at zero: one pass serves scoring and update, so it must be deterministic, and gradient
checkpointing is active in train() mode only. `weights` writes models and reads them back.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from stream_trainer.errors import SettingsError
from stream_trainer.samples.byte_tokenizer import byte_tokenizer
from stream_trainer.settings.schema import LoraSettings, ModelSettings

logger = logging.getLogger(__name__)

ADAPTER = "default"  # peft's name of the one adapter we use
DROPOUT_FIELDS = ("dropout", "pdrop", "layerdrop")  # how the configurations of transformers spell it


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to train.

    Attributes:
        model: in train() mode, float32, on `device`; with LoRA only the adapters require gradients.
        tokenizer: with a padding token.
        autocast_dtype: of the passes, or None for plain float32.
        max_positions: tokens the model can attend to, or None where it knows no limit.
        config: the configuration as the user gave it, with its dropouts; this is what gets saved.
        lora: whether the model carries adapters.
    """

    model: torch.nn.Module
    tokenizer: Any
    device: torch.device
    autocast_dtype: torch.dtype | None
    max_positions: int | None
    config: Any
    lora: bool


def load_model(settings: ModelSettings, seed: int) -> LoadedModel:
    """Load or build the model that `settings` names.

    Random weights follow from `seed` alone, and no global generator is touched.
    Raises SettingsError, in one line, for whatever the user can mend.
    """
    device = _device(settings.device)
    dtype = passes_in(settings.dtype, device)
    if dtype != settings.dtype:
        logger.warning(
            "model.dtype=bfloat16 is not for this processor, which has no instructions for it: "
            "passes run in float32; set it to float32"
        )
    config = _load_config(settings)
    tokenizer = _load_tokenizer(settings)
    if settings.config is not None:
        _end_as_tokenizer_does(config, settings.config, tokenizer)
    zeroed = copy.deepcopy(config)
    _zero_dropout(zeroed)
    # Models are built on the CPU, so no other generator takes part.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _build(settings, zeroed)
        _check_vocabulary(settings, tokenizer, model)
        if settings.lora is not None:
            model = _add_adapters(model, settings.lora)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0  # some models hold a dropout that no field of their configuration sets
    model.config.use_cache = False
    if settings.gradient_checkpointing:
        _enable_gradient_checkpointing(model)
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    return LoadedModel(
        model=model.to(device).train(),
        tokenizer=tokenizer,
        device=device,
        autocast_dtype=torch.bfloat16 if dtype == "bfloat16" else None,
        max_positions=getattr(config.get_text_config(), "max_position_embeddings", None),
        config=config,
        lora=settings.lora is not None,
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


def passes_in(dtype: str, device: torch.device) -> str:
    """What `model.dtype` comes to on a device: `float32` where a CPU has no instructions for bfloat16.

    Emulated, products take far longer than in float32, and are no more exact for it.
    """
    return "float32" if device.type == "cpu" and not _multiplies_bfloat16() else dtype


def _multiplies_bfloat16() -> bool:
    """Whether oneDNN has bfloat16 products for this CPU. torch asks in the same way, and has no public name for it."""
    built_in: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return built_in and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def _loading(setting: str, remedy: str, extra: str) -> Iterator[None]:
    """Turn whatever a loader raises into one line: it was the user who named what it tried to load."""
    try:
        yield
    except SettingsError:
        raise
    except ImportError as error:
        raise SettingsError(
            f"{setting} needs a package that is missing ({_first_line(error)}); pip install 'stream-trainer[{extra}]'"
        ) from error
    except Exception as error:
        raise SettingsError(f"{setting} cannot be loaded ({_first_line(error)}); {remedy}") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _check_directory(setting: str, name: str) -> None:
    """Refuse early what is clearly meant as a directory, before it is looked up on the hub."""
    if name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir():
        raise SettingsError(f"{setting}={name} is not a directory; correct the path")


def _load_tokenizer(settings: ModelSettings) -> Any:
    if settings.tokenizer == "bytes":
        return byte_tokenizer()
    own = settings.tokenizer is not None
    name = str(settings.tokenizer or settings.name)
    setting = "model.tokenizer" if own else "model.name"
    _check_directory(setting, name)
    origin = {} if own else {"revision": settings.revision or "main", "gguf_file": settings.gguf_file}
    with _loading(
        f"{setting}={name}: the tokenizer", "check its files and the network, or set model.tokenizer", "gguf"
    ):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=settings.trust_remote_code, **origin)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise SettingsError(
                f"{setting}={name} has neither a padding nor an end token; set model.tokenizer to another"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_config(settings: ModelSettings) -> Any:
    if settings.config is not None:
        return _config_from_fields(settings.config)
    name = str(settings.name)
    _check_directory("model.name", name)
    if settings.gguf_file is not None and Path(name).is_dir() and not (Path(name) / settings.gguf_file).is_file():
        raise SettingsError(f"model.gguf_file={settings.gguf_file} is not in model.name={name}; correct the name")
    with _loading(f"model.name={name}", _name_remedy(settings), "gguf"):
        return AutoConfig.from_pretrained(name, trust_remote_code=settings.trust_remote_code, **_origin(settings))


def _config_from_fields(fields: dict[str, Any]) -> Any:
    kind = fields["model_type"]
    with _loading(
        f"model.config.model_type={kind}", f"choose one that transformers {transformers.__version__} knows", ""
    ):
        known = AutoConfig.for_model(kind)
    for name in fields:
        if not hasattr(known, name):
            logger.warning("model.config.%s is not a field of %s: check its spelling", name, kind)
    with _loading("model.config", "correct its fields", ""):
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
    return "set model.name to a model directory, or check the network and your access to the hub"


def _zero_dropout(config: Any) -> None:
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            _zero_dropout(value)
        elif any(field in name for field in DROPOUT_FIELDS) and isinstance(value, (int, float)):
            setattr(config, name, type(value)(0))


def _build(settings: ModelSettings, config: Any) -> Any:
    if settings.config is not None:
        with _loading("model.config", "correct its fields", ""):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with _loading(f"model.name={settings.name}", _name_remedy(settings), "gguf"):
        model, report = AutoModelForCausalLM.from_pretrained(
            settings.name,
            config=config,
            dtype=torch.float32,
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
            **_origin(settings),
        )
        if report["missing_keys"]:
            # transformers would give them random values and go on.
            raise SettingsError(
                f"model.name={settings.name} lacks {min(report['missing_keys'])}; set it to a whole model"
            )
        if settings.gguf_file is None:
            # The weights are mapped from the file, which may be replaced while we train.
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = tensor.data.clone()
            return model
        # A model read from GGUF is marked as quantized, and transformers refuses to save it; the same weights in a
        # model that was never marked are fine.
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(model.state_dict())
        return plain


def _check_vocabulary(settings: ModelSettings, tokenizer: Any, model: Any) -> None:
    rows, tokens = model.get_input_embeddings().weight.shape[0], len(tokenizer)
    if tokens <= rows:
        return
    if settings.config is not None:
        raise SettingsError(
            f"model.config.vocab_size={rows} is less than the {tokens} tokens of model.tokenizer={settings.tokenizer}; "
            f"set it to {tokens} or more"
        )
    raise SettingsError(
        f"model.tokenizer={settings.tokenizer or settings.name} has {tokens} tokens, model.name={settings.name} embeds "
        f"only {rows}; set model.tokenizer to the one the model was trained with"
    )


def _enable_gradient_checkpointing(model: Any) -> None:
    # The name changed within version 5 of transformers; the first argument means the same under both.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise SettingsError(f"model.gradient_checkpointing=true: {_first_line(error)}; set it to false") from error


def _add_adapters(model: Any, settings: LoraSettings) -> Any:
    """Put adapters into `model` in place. Every other parameter stops requiring gradients."""
    setting = f"model.lora.target_modules={settings.target_modules}"
    with _loading("model.lora", "correct model.lora", "lora"):
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=0.0,
            target_modules=settings.target_modules
            if settings.target_modules == "all-linear"
            else list(settings.target_modules),
            fan_in_fan_out=any(type(module) is transformers.pytorch_utils.Conv1D for module in model.modules()),
        )
    with _loading(setting, "name modules the model has, or set it to all-linear", "lora"):
        adapted = inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    embedding, head = adapted.get_input_embeddings(), adapted.get_output_embeddings()
    if embedding.weight is head.weight and any(hasattr(module, "lora_A") for module in (embedding, head)):
        raise SettingsError(f"{setting} adapts the embedding, which is tied to the head; leave both out")
    return adapted
