"""What a model can take: how many tokens, and which of them."""

from pathlib import Path
from typing import Any

import torch

from stream_trainer.errors import SettingsError
from stream_trainer.models.refusals import first_line
from stream_trainer.settings.schema import ModelSettings

# How the configurations of models call the longest text that they take.
LENGTHS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "max_seq_length", "max_sequence_length"),
    *("n_ctx", "max_ctx", "context_length", "max_context_length", "max_target_positions", "block_size"),
)


def longest_text(config: Any) -> int | None:
    """Tokens that a model can take, as its configuration says; None if it knows no limit."""
    known = (getattr(part, name, None) for part in (config.get_text_config(), config) for name in LENGTHS)
    return min((limit for limit in known if isinstance(limit, int) and limit > 1), default=None)


@torch.no_grad()
def check_length(model: Any, max_tokens: int) -> None:
    """Try the longest text that may come, on a model whose configuration states no limit. Raises SettingsError."""
    ids = torch.zeros(1, max_tokens, dtype=torch.int64, device=next(model.parameters()).device)
    try:
        model.base_model(input_ids=ids, use_cache=False)
    except (IndexError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise SettingsError(
            f"samples.max_tokens={max_tokens}: the model fails on so many ({first_line(error)}); set it to what the "
            "model can take"
        ) from error


def check_vocabulary(settings: ModelSettings, tokenizer: Any, model: Any) -> None:
    """Refuse a tokenizer with ids that the model does not embed: the largest counts, for some leave holes.

    Raises SettingsError.
    """
    rows, needed = model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values(), default=-1) + 1
    if needed <= rows:
        return
    has = f"{needed} tokens" if needed == len(tokenizer) else f"tokens up to the id {needed - 1}"
    if settings.config is not None:
        raise SettingsError(
            f"model.config.vocab_size={rows} is less than the {needed} tokens of model.tokenizer={settings.tokenizer}; "
            f"set it to {needed} or more"
        )
    raise SettingsError(
        f"model.tokenizer={settings.tokenizer or settings.name} has {has}, model.name={settings.name} embeds only "
        f"{rows}; set model.tokenizer to the one the model was trained with"
    )


def package_of(directory: Path) -> str | None:
    """The package that reads a tokenizer of which there is only `tokenizer.model`; None if there is more, or less."""
    path = directory / "tokenizer.model"
    if (directory / "tokenizer.json").exists() or not path.is_file():
        return None
    with path.open("rb") as file:
        # A file of sentencepiece is a message of protobuf, whose first field is a piece; tiktoken's is lines of base64.
        return "sentencepiece" if file.read(1) == b"\n" else "tiktoken"
