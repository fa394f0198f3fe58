"""What goes wrong while a model is put together, in one line that names a setting and the remedy."""

from collections.abc import Iterator
from contextlib import contextmanager

from stream_trainer.errors import SettingsError

# What a loader says when it lacks a package -> the package, and our extra that brings it.
PACKAGES = {
    "bitsandbytes": ("bitsandbytes", "quantised"),
    "sentencepiece": ("sentencepiece", "tokenizers"),
    "tiktoken": ("tiktoken", "tokenizers"),
    "protobuf": ("protobuf", "tokenizers"),
    "flashattention": ("flash-attn", "flash"),
    "flash_attn": ("flash-attn", "flash"),
    "flash-attn": ("flash-attn", "flash"),
    "optimum": ("optimum", None),
    "gptqmodel": ("gptqmodel", None),
    "compressed-tensors": ("compressed-tensors", None),
    "compressed_tensors": ("compressed-tensors", None),
    "gguf": ("gguf", "gguf"),
    "peft": ("peft", "lora"),
    "accelerate": ("accelerate", "quantised"),
}


@contextmanager
def loading(setting: str, remedy: str, extra: str = "") -> Iterator[None]:
    """Turn whatever a loader raises into one line: it was the user who named what it tried to load.

    `extra`: ours that brings what is missing, where the error names no package that we know.
    """
    try:
        yield
    except SettingsError:
        raise
    except ImportError as error:
        said = first_line(error)
        raise SettingsError(f"{setting} needs a package that is missing ({said}); {_install(error, extra)}") from error
    except Exception as error:
        said = first_line(error)
        if any(package in said.lower() for package in ("sentencepiece", "tiktoken")):  # often named one for the other
            remedy = f"pip install 'stream-trainer[tokenizers]', or {remedy}"
        raise SettingsError(f"{setting} cannot be loaded ({said}); {remedy}") from error


def install(package: str) -> str:
    """How to get a package that is known here."""
    extra = next(extra for name, extra in PACKAGES.values() if name == package)
    return f"pip install {package}" if extra is None else f"pip install 'stream-trainer[{extra}]' ({package})"


def first_line(error: BaseException) -> str:
    """What an error says, cut to its first line; its kind if it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _install(error: ImportError, extra: str) -> str:
    said = str(error).lower()
    known = next((found for words, found in PACKAGES.items() if words in said), None)
    if extra and (known is None or known[1] == extra):
        return f"pip install 'stream-trainer[{extra}]'"
    if known is not None:
        return install(known[0])
    return f"install {error.name}" if error.name else "install it"
