"""Copies in other places: an object store by `fsspec`, a repository of the Hugging Face Hub."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stream_trainer.errors import SettingsError
from stream_trainer.models.refusals import first_line, loading
from stream_trainer.publishing.held import HeldFiles
from stream_trainer.publishing.versions import CURRENT, read_about
from stream_trainer.settings.sections.publish import HubSettings


class StoreError(Exception):
    """The store refused or was not there; one line."""


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Stores raise whatever their clients raise."""
    try:
        yield
    except Exception as error:
        raise StoreError(f"{what} failed ({type(error).__name__}: {first_line(error)})") from error


def open_store(setting: str, url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it. Raises SettingsError if a package is missing."""
    named = f"{setting}={url}"
    with loading(named, "correct the address", "upload"):
        import fsspec
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise SettingsError(f"{named} needs the store's own client ({first_line(error)}); pip install it") from error
    except Exception as error:
        raise SettingsError(f"{named} cannot be used ({first_line(error)}); correct the address") from error
    return system, path.rstrip("/")


def upload(setting: str, url: str, name: str, files: HeldFiles, last: str) -> None:
    """Copy files to `url/name/`, the one called `last` at the end: where it is, all are. Raises StoreError."""
    system, root = open_store(setting, url)
    with _one_line(f"{setting}={url}: the upload of {name}"):
        for file in [*(file for file in files.names if file != last), last]:
            place = f"{root}/{name}/{file}"
            system.makedirs(place.rpartition("/")[0], exist_ok=True)
            with system.open(place, "wb") as to:
                files.copy(file, to)


def upload_current(setting: str, url: str, name: str) -> None:
    """Write the name of the current version to `url/current`. Raises StoreError."""
    system, root = open_store(setting, url)
    with _one_line(f"{setting}={url}: writing {CURRENT}"):
        system.pipe_file(f"{root}/{CURRENT}", f"{name}\n".encode())


def hub_uploader(settings: HubSettings) -> Callable[[Path], None]:
    """What makes a commit of a version. Raises SettingsError if a package is missing."""
    with loading(f"publish.hub.repo={settings.repo}", "correct publish.hub", "upload"):
        from huggingface_hub import HfApi

        api = HfApi(token=None if settings.token is None else settings.token.get_secret_value())

    def push(path: Path) -> None:
        """Raises StoreError."""
        with _one_line(f"publish.hub.repo={settings.repo}: the upload of {path.name}"):
            repo = api.create_repo(settings.repo, private=settings.private, exist_ok=True).repo_id
            message = f"{path.name}, step {read_about(path)['step']}"
            # What an earlier version had and this one has not, such as shards, goes.
            api.upload_folder(repo_id=repo, folder_path=path, commit_message=message, delete_patterns="*")

    return push
