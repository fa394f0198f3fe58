"""The model card of a version, as the Hugging Face Hub reads it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml


def card_text(about: Mapping[str, Any], name: str) -> str:
    """`README.md` of a version: front matter, then what was learned, from where, and how well.

    `about`: what `version.json` holds.
    """
    base = _base_name(about["base_model"])
    head: dict[str, Any] = {"base_model": base} if base else {}
    head |= {
        "library_name": "transformers" if about["merged"] else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["stream-trainer", *(["lora"] if about["adapter"] else [])],
    }
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {name}",
        "",
        f"Trained by stream-trainer {about['stream_trainer']} up to step {about['step']:,}, "
        f"on the samples of a stream that move {base or 'a new model'} to a target.",
        "",
        f"- published: {about['time']}",
        f"- checkpoint: `{about['checkpoint']}`",
        f"- settings: `{about['settings']}`",
        f"- target: `{about['target']}`",
        *_files(about),
        "",
        *_losses(about),
        "",
        *_table(("records", "count"), [(name, f"{count:,}") for name, count in about["records"].items()]),
        "",
        *_table(("stream", "read on at"), [(f"`{name}`", str(next_)) for name, next_ in about["positions"].items()]),
    ]
    return "\n".join(lines) + "\n"


def _base_name(name: str | None) -> str | None:
    """The base's name on the Hub, or of its directory: a path says nothing elsewhere."""
    return Path(name).name if name is not None and Path(name).is_dir() else name


def _files(about: Mapping[str, Any]) -> list[str]:
    whole = "- the whole model: this directory, for `AutoModelForCausalLM.from_pretrained`"
    adapter = "- the adapters alone: `adapter/`, for `PeftModel.from_pretrained`"
    return [*([whole] if about["merged"] else []), *([adapter] if about["adapter"] else [])]


def _losses(about: Mapping[str, Any]) -> list[str]:
    """Losses now, at the start, and the difference; positive where something was forgotten."""
    start = about["start_losses"]
    rows = [
        (name, f"{loss:.4f}", f"{start[name]:.4f}" if name in start else "", _rise(loss, start.get(name)))
        for name, loss in about["losses"].items()
    ]
    head = (f"loss at step {about['evaluated_step']:,} (nats per token)", "now", "at the start", "change")
    return _table(head, rows)


def _rise(now: float, start: float | None) -> str:
    return "" if start is None else f"{now - start:+.4f}"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *rows)]
