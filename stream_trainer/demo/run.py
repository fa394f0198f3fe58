"""The demo: broker, stream, training and report on this machine, in a minute or two.

Two runs of the service read the same stream: one selects, with the default profile, the control draws at random and
trains on as many samples. What each has learned, and in what time, is measured on held-out samples of the target that
took no part in either. Domain labels are counted for the report and select nothing.
"""

import argparse
import json
import math
import signal
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from stream_trainer import service
from stream_trainer.commands.produce import produce
from stream_trainer.demo.broker import API_VERSION, CAPACITY_BYTES, HOST, free_port, has_mock_cluster, mock_cluster
from stream_trainer.demo.display import HELD_OUT, SELECTION, UNIFORM, Display, Watch, print_report, share
from stream_trainer.demo.stream import HELD_OUT_SAMPLES, SHARES, TARGET, TARGET_SAMPLES, DemoStream, write_stream
from stream_trainer.errors import SettingsError
from stream_trainer.monitoring.logs import configure_logging
from stream_trainer.settings.schema import (
    CheckpointSettings,
    DeadLetterSettings,
    EvaluationSettings,
    LogSettings,
    ModelSettings,
    OptimizerSettings,
    ServerSettings,
    Settings,
    TargetSettings,
    TrainingSettings,
)
from stream_trainer.settings.sections.selection import SelectionSettings
from stream_trainer.settings.sections.source import JsonlSettings, KafkaSettings, SourceSettings
from stream_trainer.training.watchers import Watcher

INTAKE = 32  # records of the stream that come in for each step
WAITING = 128
UNIFORM_POOL, UNIFORM_BATCH = 16, 4
DEFAULT_STEPS = 250
CHECKS = 25  # evaluations of a run
TOPIC = "demo"
THREADS = 1  # the model is too small to gain from more, and two wait for each other where cores are shared

MODEL_CONFIG = {
    "model_type": "llama",
    "vocab_size": 259,  # of the tokenizer `bytes`
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}

EXAMPLES = """\
examples:
  stream-trainer demo
      a broker of its own, a made-up stream, and a report of what selection bought
  stream-trainer demo --dir demo --summary demo.json
      keep stream, checkpoints, dead letters and log in the directory demo, and the figures in a file
"""

# A small stream needs less room than the profile's; everything else is the profile's.
METHODS = {
    SELECTION: SelectionSettings(waiting=WAITING, intake=INTAKE),
    UNIFORM: SelectionSettings(draw="uniform", weigh="equal", pool_size=UNIFORM_POOL, batch_size=UNIFORM_BATCH),
}


@dataclass(frozen=True)
class _Demo:
    """What every part of the demo works with."""

    directory: Path
    steps: int
    seed: int
    port: int
    stream: DemoStream
    display: Display
    stop: threading.Event


@dataclass(frozen=True)
class _Run:
    """A finished run, and its records by outcome."""

    watch: Watch
    outcomes: dict[str, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `stream-trainer demo`."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--steps", type=int, default=DEFAULT_STEPS, metavar="N", help=f"steps of training (default {DEFAULT_STEPS})"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of stream, model and draws (default 0)")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="write the figures there as JSON")
    parser.add_argument(
        "--dir", type=Path, metavar="DIR", help="work there and keep everything (default: a temporary one)"
    )
    parser.add_argument(
        "--source", choices=["kafka", "jsonl"], help="read a topic or a file (default: kafka if a broker is installed)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo. Returns the exit code: 0, or 130 after Ctrl-C.

    Raises SettingsError for arguments that cannot be used, and what the service raises.
    """
    if args.steps < 1:
        raise SettingsError(f"--steps {args.steps} is not above zero; correct it")
    started = time.monotonic()
    console = Console(soft_wrap=True, highlight=False)
    stop = threading.Event()
    with ExitStack() as stack:
        received = stack.enter_context(service.stopping_on_signals(stop))
        directory = _directory(args.dir, stack)
        _check_summary(args.summary)
        configure_logging(LogSettings(), stack.enter_context((directory / "service.log").open("w")))
        port = free_port()
        demo = _Demo(
            directory=directory,
            steps=args.steps,
            seed=args.seed,
            port=port,
            stream=write_stream(directory, args.steps * INTAKE + WAITING, args.seed),
            display=Display(console, f"http://{HOST}:{port}"),
            stop=stop,
        )
        source = _publish(demo, args.source, console, stack)
        runs = _train(demo, source, console)
        if len(runs) < 2:
            console.print(f"Stopped by {received[0].name}; without both runs there is no report.")
            return 130 if received[0] is signal.SIGINT else 0
    selected, uniform = runs
    print_report(console, demo.stream.counts, selected.watch, uniform.watch)
    if args.dir is not None:
        console.print(f"Stream, checkpoints, dead letters and log are in {args.dir}.")
    if args.summary is not None:
        figures = _summary(selected, uniform)
        figures |= {"seconds": round(time.monotonic() - started, 1), "source": source.kind, "seed": args.seed}
        args.summary.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def _directory(path: Path | None, stack: ExitStack) -> Path:
    """An empty directory. Checkpoints of an earlier demo would be resumed, so one that holds anything is refused."""
    if path is None:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stream-trainer-demo-")))
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise SettingsError(f"--dir {path} is not empty; name a new directory")
    except OSError as error:
        raise SettingsError(f"--dir {path} cannot be used ({error.strerror}); name another directory") from None
    return path


def _check_summary(path: Path | None) -> None:
    """Before minutes of work, not after."""
    if path is None:
        return
    try:
        path.touch()
    except OSError as error:
        raise SettingsError(f"--summary {path} cannot be written ({error.strerror}); name another file") from None


def _publish(demo: _Demo, kind: str | None, console: Console, stack: ExitStack) -> SourceSettings:
    """Start a broker that runs until `stack` closes and fill its topic; or read the file, where there is none."""
    if kind is None and not has_mock_cluster():
        console.print("The mock cluster (package confluent-kafka) is not installed: the stream is read from a file.")
        kind = "jsonl"
    if kind is None and demo.stream.records.stat().st_size > CAPACITY_BYTES:
        console.print("The mock cluster would forget the first records of so long a stream: it is read from a file.")
        kind = "jsonl"
    if kind == "jsonl":
        return SourceSettings(kind="jsonl", jsonl=JsonlSettings(path=str(demo.stream.records)))
    servers = stack.enter_context(mock_cluster(demo.directory / "broker.log", [TOPIC]))
    kafka = KafkaSettings(bootstrap_servers=servers, api_version=API_VERSION, topic=TOPIC, stop_at_end=True)
    report = produce([demo.stream.records], None, kafka, seed=demo.seed, exact=False)  # the mock has no transactions
    console.print(f"Published {report.records} records to the topic {TOPIC} at {servers}, in {report.seconds:.1f} s.")
    return SourceSettings(kind="kafka", kafka=kafka)


def _train(demo: _Demo, source: SourceSettings, console: Console) -> list[_Run]:
    """Both runs; fewer if a signal came in between."""
    console.print(f"Page: http://{HOST}:{demo.port}/  Metrics: http://{HOST}:{demo.port}/metrics")
    runs: list[_Run] = []
    with demo.display.shown():
        selected = _serve(demo, _settings(demo, source, SELECTION, demo.steps), demo.steps)
        if demo.stop.is_set():
            return runs
        runs.append(selected)
        # The control trains on as many samples: a step that selects may take fewer than it is allowed to, or none.
        steps = max(1, math.ceil(selected.watch.trained.total() / UNIFORM_BATCH))
        uniform = _serve(demo, _settings(demo, source, UNIFORM, steps), steps)
        if not demo.stop.is_set():
            runs.append(uniform)
    return runs


def _serve(demo: _Demo, settings: Settings, steps: int) -> _Run:
    """One run of the service."""
    watch = Watch(UNIFORM if settings.selection.draw == "uniform" else SELECTION, steps)
    demo.display.begin(watch)
    summary = service.serve(settings, demo.stop, Watcher(demo.display.step, watch.evaluated))
    return _Run(watch, summary.counts)


def _model_settings() -> ModelSettings:
    return ModelSettings(config=dict(MODEL_CONFIG), tokenizer="bytes")


def _settings(demo: _Demo, source: SourceSettings, method: str, max_steps: int) -> Settings:
    """What a user would write into the file; each run has a consumer group and a directory of its own."""
    directory = demo.directory / method
    return Settings(
        source=source.model_copy(
            update={"kafka": source.kafka.model_copy(update={"group_id": f"{TOPIC}-{method}"})},
        ),
        model=_model_settings(),
        target=TargetSettings(path=demo.stream.target, max_samples=TARGET_SAMPLES),
        selection=METHODS[method],
        optimizer=OptimizerSettings(learning_rate=2e-3, warmup_steps=20),
        training=TrainingSettings(max_steps=max_steps, seed=demo.seed, threads=THREADS),
        evaluation=EvaluationSettings(
            every_steps=max(1, max_steps // CHECKS), sets={HELD_OUT: demo.stream.held_out}, max_samples=HELD_OUT_SAMPLES
        ),
        checkpoint=CheckpointSettings(dir=directory / "checkpoints"),
        dead_letters=DeadLetterSettings(path=directory / "dead-letters.jsonl"),
        server=ServerSettings(host=HOST, port=demo.port),
    )


def _summary(selected: _Run, uniform: _Run) -> dict[str, object]:
    """The figures, for scripts. Shares are of usable records; what it took is up to uniform's last loss."""
    final = uniform.watch.curve[-1]
    took = selected.watch.took(final.loss)
    return {
        "records_consumed": sum(selected.outcomes.values()),
        "records_trained": selected.outcomes["trained"],
        "outcomes": selected.outcomes,
        "target_share_stream": SHARES[TARGET],
        "target_share_trained": share(selected.watch.trained, TARGET),
        "target_loss_before": selected.watch.curve[0].loss,
        "target_loss_after": selected.watch.curve[-1].loss,
        "seconds_trained": selected.watch.curve[-1].seconds,
        "uniform_records_trained": uniform.outcomes["trained"],
        "uniform_target_share_trained": share(uniform.watch.trained, TARGET),
        "uniform_target_loss_after": final.loss,
        "uniform_seconds_trained": final.seconds,
        "samples_to_uniform_loss": None if took is None else took.samples,
        "seconds_to_uniform_loss": None if took is None else took.seconds,
    }
