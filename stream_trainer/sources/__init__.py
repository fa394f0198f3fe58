"""Where records come from: one protocol (`base`), a Kafka topic (`kafka`), a file or standard input (`jsonl`)."""

from collections.abc import Callable

from stream_trainer.settings.sections.source import SourceSettings
from stream_trainer.sources.base import NoSource, Source
from stream_trainer.sources.jsonl import JsonlSource


def open_source(
    settings: SourceSettings,
    confirm: Callable[[], None] | None = None,
    owned: Callable[[int], bool] = lambda _: True,
) -> Source:
    """The source that `source.kind` names, not yet started. `confirm` raises if another trainer has our place.

    `owned` says which partitions this process reads, by their numbers.

    Raises SettingsError if it cannot work here.
    """
    if settings.kind == "jsonl":
        return JsonlSource(settings.jsonl) if owned(0) else NoSource()
    from stream_trainer.sources.kafka import KafkaSource  # only who reads a topic needs a Kafka client

    return KafkaSource(settings.kafka, confirm=confirm, owned=owned)
