"""What both commands on dead letters share: where the letters come from."""

import argparse
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from stream_trainer.commands.produce import add_connection_arguments, kafka_settings
from stream_trainer.errors import SettingsError
from stream_trainer.ingest.letter import DeadLetter, from_message, read_dead_letters
from stream_trainer.ingest.letter_mark import aside, rotated
from stream_trainer.settings.sections.source import KafkaSettings
from stream_trainer.sources.kafka import KafkaSource

POLL_S = 0.2
CLIENT_ID = "stream-trainer-dead-letters"


def add_letter_arguments(parser: argparse.ArgumentParser) -> None:
    """Which letters: a file or a topic, all or those with one reason."""
    parser.add_argument("file", nargs="?", type=Path, help="file of dead letters (dead_letters.path), with FILE.1, ...")
    parser.add_argument("--topic", help="topic of dead letters (dead_letters.topic), instead of a file")
    parser.add_argument("--reason", metavar="NAME", help="only those with this reason")
    add_connection_arguments(parser)


def wanted_letters(args: argparse.Namespace) -> Iterator[DeadLetter]:
    """Each letter once, though it may be there twice: the first of every position.

    Raises SettingsError if they cannot be read, or none has `args.reason`; SourceError if no broker answers.
    """
    if (args.file is None) == (args.topic is None):
        raise SettingsError("name a file of dead letters, or a topic with --topic")
    place = args.file if args.file is not None else args.topic
    seen, reasons, found = set[str](), set[str](), False
    for letter in _from_file(args.file) if args.file is not None else _from_topic(kafka_settings(args)):
        reasons.add(letter.reason)
        if args.reason in (None, letter.reason) and letter.position not in seen:
            seen.add(letter.position)
            found = True
            yield letter
    if args.reason is not None and not found:
        raise SettingsError(
            f"--reason {args.reason} is in no dead letter of {place}; it has {', '.join(sorted(reasons)) or 'none'}"
        )


def _from_file(path: Path) -> Iterator[DeadLetter]:
    try:
        for file in [*(aside(path, number) for number in rotated(path)), path]:
            yield from read_dead_letters(file)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read ({error.strerror}); name a file of dead letters") from None


def _from_topic(settings: KafkaSettings) -> Iterator[DeadLetter]:
    """Up to where the topic ends now."""
    reading = settings.model_copy(update={"group_id": None, "stop_at_end": True, "start": "earliest"})
    with closing(KafkaSource(reading, CLIENT_ID)) as source:
        source.start({}, {}, {})
        while not source.exhausted:
            for message in source.poll(POLL_S):
                try:
                    yield from_message(message)
                except (ValueError, KeyError) as error:
                    raise SettingsError(
                        f"{message.partition} offset {message.offset} is no dead letter ({type(error).__name__}); "
                        "name a topic of dead letters"
                    ) from error
