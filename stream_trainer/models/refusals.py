"""What goes wrong while a model is put together, in one line that names a setting and the remedy."""

from collections.abc import Iterator
from contextlib import contextmanager

from stream_trainer.errors import SettingsError


@contextmanager
def loading(setting: str, remedy: str, extra: str) -> Iterator[None]:
    """Turn whatever a loader raises into one line: it was the user who named what it tried to load."""
    try:
        yield
    except SettingsError:
        raise
    except ImportError as error:
        raise SettingsError(
            f"{setting} needs a package that is missing ({first_line(error)}); pip install 'stream-trainer[{extra}]'"
        ) from error
    except Exception as error:
        raise SettingsError(f"{setting} cannot be loaded ({first_line(error)}); {remedy}") from error


def first_line(error: BaseException) -> str:
    """What an error says, cut to its first line; its kind if it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
