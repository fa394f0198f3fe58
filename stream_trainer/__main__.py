"""`python -m stream_trainer`, which torchrun starts as `-m stream_trainer`; and `stream-trainer`."""

from typing import NoReturn

from stream_trainer.cli import main
from stream_trainer.distributed.leaving import leave


def start() -> NoReturn:
    """Do what the command line says, and end."""
    leave(main())


if __name__ == "__main__":
    start()
