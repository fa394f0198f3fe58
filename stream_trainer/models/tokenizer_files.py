"""Which package a tokenizer's files need, before transformers tries others."""

from importlib.util import find_spec
from pathlib import Path

from stream_trainer.errors import SettingsError

PIECES = "tokenizer.model"  # SentencePiece's, or tiktoken's, which is text
BEGIN = b"\n"  # of the first, a message of Protobuf


def check_tokenizer_files(setting: str, name: str) -> None:
    """Raises SettingsError if a directory has a tokenizer for SentencePiece only, and that package is missing."""
    pieces = Path(name) / PIECES
    if not pieces.is_file() or (Path(name) / "tokenizer.json").exists() or find_spec("sentencepiece") is not None:
        return
    with pieces.open("rb") as file:
        if file.read(len(BEGIN)) == BEGIN:
            raise SettingsError(
                f"{setting}={name} has a {PIECES} and no tokenizer.json, which needs the package sentencepiece; "
                "pip install sentencepiece, or set model.tokenizer to one with a tokenizer.json"
            )
