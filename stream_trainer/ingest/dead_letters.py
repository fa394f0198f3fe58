"""Records that could not be used, kept with their original bytes and the reason: in a file, or in a Kafka topic.

A letter is *held* until its place has it. Only then does its record count as decided, so that a checkpoint can be made
at any time: a record whose letter is held is undecided in it, and is read and judged again after a restart.
"""

from collections.abc import Callable
from typing import Any, Protocol

from stream_trainer.ingest.letter import DeadLetter
from stream_trainer.ingest.letter_file import FileDeadLetters
from stream_trainer.ingest.letter_topic import TopicDeadLetters
from stream_trainer.settings.schema import Settings


class DeadLetters(Protocol):
    """Where records go that cannot be used. Thread-safe: one thread sends, another waits and flushes."""

    def send(self, letter: DeadLetter) -> None:
        """Take a letter. It is held until `settled` has returned it. Raises SourceError if its place refuses it."""

    def settled(self) -> list[DeadLetter]:
        """Those that are kept since the last call, each once. Tries again what could not be kept before.

        Raises SourceError as `send` does.
        """

    def wait(self) -> None:
        """Give what was sent just now a few seconds to be kept."""

    def flush(self) -> None:
        """Return once all that `settled` has returned is durable. Raises SourceError if it is not."""

    @property
    def held(self) -> int:
        """Letters that are not kept yet."""

    @property
    def full(self) -> bool:
        """Whether so much is held, or for so long, that nothing more should be read."""

    def state_dict(self) -> dict[str, Any]:
        """JSON of what is kept, to be stored with a cursor that counts exactly these letters as decided."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Cut off what was kept after this state, or take note of it: its records are read again.

        Raises ValueError if it is no state.
        """

    def close(self) -> None:
        """Wait, flush, and release files and connections. Idempotent. Raises SourceError as `flush` does."""


def open_dead_letters(settings: Settings, confirm: Callable[[], None] = lambda: None) -> DeadLetters:
    """The kind that the settings name. `confirm` raises FencedError if another trainer has taken over.

    Raises SettingsError if the file or the topic cannot be written.
    """
    if settings.dead_letters.kind == "file":
        return open_file(settings)
    kafka, topic = settings.source.kafka, settings.dead_letters.topic
    return TopicDeadLetters(kafka, topic, lambda: open_file(settings), confirm)


def open_file(settings: Settings) -> FileDeadLetters:
    """The file that the settings name. Raises SettingsError if it cannot be written."""
    wanted = settings.dead_letters
    return FileDeadLetters(wanted.path, settings.checkpoint.digits, wanted.max_bytes, wanted.keep)
