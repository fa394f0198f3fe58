"""`python -m stream_trainer`, which torchrun starts as `-m stream_trainer`."""

import sys

from stream_trainer.cli import main

sys.exit(main())
