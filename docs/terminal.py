"""Make the pictures of the terminal, docs/pictures/terminal-{80,200}.svg, from what a short run shows in its midst.

python docs/terminal.py   # takes a minute
"""

import io
import logging
import os
import re
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from stream_trainer.demo.run import METHODS, MODEL_CONFIG
from stream_trainer.demo.stream import write_stream
from stream_trainer.monitoring.logs import Formatter, configure_logging
from stream_trainer.monitoring.panel import panel
from stream_trainer.monitoring.progress import Progress
from stream_trainer.records import Sample
from stream_trainer.service import serve
from stream_trainer.settings.schema import LogSettings, Settings
from stream_trainer.training.step import StepReport
from stream_trainer.training.watchers import Watcher

PICTURES = Path(__file__).resolve().parent / "pictures"
WIDTHS, HEIGHT = (80, 200), 24
STEPS, LINES, RECORDS = 60, 6, 20_000


def main() -> None:
    """Run, and draw after `STEPS` steps."""
    progress, stop, log = Progress(), threading.Event(), io.StringIO()
    configure_logging(LogSettings(), log)
    logging.getLogger().handlers[0].setFormatter(Formatter(as_json=False))

    def draw(step: int, _pool: Sequence[Sample], _report: StepReport) -> None:
        progress.now()  # looks at the lag, for its fall to be known at the end
        if step == STEPS:
            for width in WIDTHS:
                _draw(progress, log.getvalue().splitlines()[-LINES:], width)
            stop.set()

    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        serve(_settings(Path()), stop, Watcher(on_step=draw), progress=progress)


def _draw(progress: Progress, lines: Sequence[str], width: int) -> None:
    console = Console(record=True, width=width, height=HEIGHT, file=io.StringIO(), force_terminal=True)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=False)
    console.print(panel(progress.now(), "stream-trainer · samples", width, HEIGHT))
    path = PICTURES / f"terminal-{width}.svg"
    svg = console.export_svg(title="stream-trainer run --config stream-trainer.yaml")
    path.write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL))  # which would be fetched from elsewhere


def _settings(folder: Path) -> Settings:
    stream = write_stream(folder, RECORDS, 0)
    return Settings(
        source={"kind": "jsonl", "jsonl": {"path": str(stream.records)}},
        model={"config": dict(MODEL_CONFIG), "tokenizer": "bytes"},
        target={"path": stream.target},
        selection=METHODS["selection"],
        optimizer={"learning_rate": 2e-3, "warmup_steps": 20},
        evaluation={"every_steps": 20, "sets": {"held-out": stream.held_out}, "max_samples": 16},
        checkpoint={"dir": folder / "checkpoints", "every_steps": 40},
        dead_letters={"path": folder / "dead-letters.jsonl"},
        server={"enabled": False},
    )


if __name__ == "__main__":
    main()
