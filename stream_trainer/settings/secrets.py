"""What an error may quote: never what is, or may be, a password. Every message about settings passes through here."""

import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, SecretStr

from stream_trainer.errors import SettingsError

MASK = "**********"
MAX_SECRET_BYTES = 64 * 1024

_WORDS = r"pass|pasw|psw|pwd|secret|credential|api_?key|jaas"
_NAME = re.compile(rf"{_WORDS}|(^|[._-])(token|auth|pw)$", re.IGNORECASE)
# A value may be a password without standing in a field of that kind: a misplaced line, or a URL with a user in it.
_VALUE = re.compile(rf"[^\s/:]+:[^\s/@]+@|({_WORDS}|token(?!s\b|izer))\w*[\"']?\s*[=: ]|^\s*\[?\s*\{{", re.IGNORECASE)
_BESIDE = re.compile(r"source|kafka|sasl|ssl", re.IGNORECASE)  # what the names of settings beside a secret have in them
_PLAIN_NAME = re.compile(r"[A-Za-z_-]+")
# The words of argparse's own message, before it quotes what it was given.
_OWN_WORDS = re.compile(r"(argument [\w/-]+: )?[a-z ]+")


def is_secret_name(name: str) -> bool:
    """Whether a setting of this name holds a password. One that names a file does not."""
    return bool(_NAME.search(name)) and not name.endswith("file")


def shown_name(name: str) -> str:
    """A name that we do not know, as an error may quote it: a part that is no plain word may be a password."""
    parts = name.split(".")
    return ".".join(part if _PLAIN_NAME.fullmatch(part) else "..." for part in parts[:6])


def shown_value(name: str, value: object, private: bool) -> str:
    """`value` as an error may quote it: short, on one line, and masked if it is or may be a password.

    `private`: the setting is a secret or stands beside one, where a value may have slipped a line; numbers pass.
    """
    if is_secret_name(name) or (private and not isinstance(value, int | float | dict)) or _VALUE.search(str(value)):
        return f"a {type(value).__name__}" if isinstance(value, dict) else MASK
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(part, dict | list) for part in value)):
        return f"a {type(value).__name__}"
    text = value if isinstance(value, str) and re.fullmatch(r"\S+", value) and value.isprintable() else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def shown_usage(message: str, arguments: Sequence[str]) -> str:
    """Argparse's `message` about `arguments`. If these hold a password, only its own words."""
    if not any(is_sensitive(argument) for argument in arguments):
        return message
    own = _OWN_WORDS.match(message)
    return own[0].strip() if own else "the arguments cannot be understood"


def read_secret(setting: str, path: Path) -> str:
    """What the file of a setting holds, less the line's end. Raises SettingsError if that is no secret."""
    # A path in no directory may be a secret that was put here by mistake.
    shown = path if path.parent.is_dir() else "..."
    try:
        with path.open("rb") as file:
            text = file.read(MAX_SECRET_BYTES + 1).decode().rstrip("\r\n")
    except OSError as error:
        raise SettingsError(
            f"{setting}={shown} cannot be read ({error.strerror}); name a readable file that holds the secret"
        ) from None
    except UnicodeDecodeError:
        raise SettingsError(f"{setting}={shown} is not UTF-8; write the secret as text into it") from None
    if not text or len(text) > MAX_SECRET_BYTES:
        problem = "is empty" if not text else f"is larger than {MAX_SECRET_BYTES} bytes"
        raise SettingsError(f"{setting}={shown} {problem}; write the secret alone into it")
    return text


def secret_of(section: BaseModel, where: str, name: str) -> str | None:
    """The secret of a setting, from itself or from the file of `{name}_file`; `where` names the section in errors."""
    given: SecretStr | None = getattr(section, name)
    if given is not None:
        return given.get_secret_value()
    path: Path | None = getattr(section, f"{name}_file")
    return None if path is None else read_secret(f"{where}.{name}_file", path)


def is_sensitive(argument: str) -> bool:
    """Whether a word of a command line names or holds a password, or may: then nothing near it is quoted."""
    return bool(_NAME.search(argument.partition("=")[0]) or _BESIDE.search(argument) or _VALUE.search(argument))
