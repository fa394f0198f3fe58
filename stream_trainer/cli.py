"""The command line, `stream-trainer`. Heavy modules are imported by the command that needs them: help is instant.

Problems are printed on standard error as `error: ...`, one line each, and the exit code tells their kind (`errors.py`).
"""

import argparse
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

from stream_trainer import __version__
from stream_trainer.errors import SettingsError, StreamTrainerError

_DESCRIPTION = "Fine-tunes a language model continuously from a Kafka topic, on the samples that move it to a target."

_COMMANDS = """\
commands:
  run           train from the stream until told to stop
  produce       publish a JSONL file as records of a topic
  demo          broker, stream, training and report on this machine, in minutes
  select        choose the best samples of a file, or parameters to train, once and offline
  config        show, check or describe the settings
  dead-letters  what could not be used and why; publish it again
  replay        make the steps between two checkpoints again, and compare to the bit
  models        published versions: list, show, verify, roll back, promote
  ledger        what became of a record, and which models were trained on it
  ctl           pause, resume, checkpoint, reload the target of a trainer that runs, or ask it

examples:
  stream-trainer demo
  stream-trainer config check --config stream-trainer.yaml
  stream-trainer run --config stream-trainer.yaml --optimizer.learning_rate=1e-5
  STREAM_TRAINER_SOURCE__KAFKA__TOPIC=samples stream-trainer run --config stream-trainer.yaml

`stream-trainer COMMAND --help` tells more; `stream-trainer run --help-all` lists every setting.
"""

_SETTINGS_HELP = """\
Settings come from the file, then the environment, then the command line; the later wins. The setting
source.kafka.topic, for example, is

  in the file           source:
                          kafka:
                            topic: samples
  in the environment    STREAM_TRAINER_SOURCE__KAFKA__TOPIC=samples
  on the command line   --source.kafka.topic=samples

STREAM_TRAINER_CONFIG may name the file. Lists and mappings are written as in YAML: --optimizer.betas='[0.9, 0.95]'.
"""

_SELECT_METHODS = """\
methods:
  dual-sft     parameters to train and samples to train on, from one gradient interaction matrix (arXiv 2605.06166)
  cluster-ucb  samples to train on, with gradients of a part of the file only (arXiv 2506.10288)

examples:
  stream-trainer select dual-sft --model M --pool pool.jsonl --target target.jsonl --data 10% --params 5% --out DIR
  stream-trainer select cluster-ucb --model M --pool pool.jsonl --target target.jsonl --budget 20% --data 5% --out DIR
"""

_RUN_EXAMPLES = """\
examples:
  stream-trainer run --config stream-trainer.yaml
  stream-trainer run --source.kafka.topic=samples --model.name=./model --target.path=target.jsonl
  stream-trainer run --config stream-trainer.yaml --source.kind=jsonl --source.jsonl.path=- < samples.jsonl

SIGTERM and Ctrl-C end the run with a checkpoint; the next run with the same checkpoint.dir goes on from there.
Exit codes: 0 done, 2 settings, 3 stream, 4 data loss, 5 checkpoint, 6 taken over by another trainer, 7 training,
8 too many dead letters, 9 another process of the run has ended.
"""


_REPLAY_EXAMPLES = """\
examples:
  stream-trainer replay --config stream-trainer.yaml --from step-00000200.e1 --to step-00000400.e1
  stream-trainer replay --config stream-trainer.yaml --from step-00000200.e1 --to step-00000400.e1 --scratch /big/disk

Use the settings and the machine of the run. The trainer may go on meanwhile: nothing of it is written.
It takes about as long as the steps took, and the memory of a trainer. `--scratch` needs room for checkpoints.

Exit codes: 0 equal, 1 something differs, 2 no such checkpoint, or the plan or records between them are gone.
All others as of `stream-trainer run`.
"""

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


class _Parser(argparse.ArgumentParser):
    """Reports its errors like all others, in one line, rather than below the usage, and never with a password."""

    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        self._given = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        from stream_trainer.settings.secrets import shown_usage

        raise SettingsError(f"{shown_usage(message, self._given)}; see {self.prog} --help")


class _FirstSettings(argparse.Action):
    """`--help`, with the settings that a first run needs. Gathering them takes a moment, so it waits to be asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from stream_trainer.settings.help import describe_first_settings

        more = "\n`--help-all` lists every setting."
        _print(f"{parser.format_help()}\nsettings that matter first:\n{describe_first_settings()}{more}")
        parser.exit()


class _AllSettings(argparse.Action):
    """`--help-all`, with every setting and where it may be given."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from stream_trainer.settings.help import describe_settings

        _print(f"{parser.format_help()}\n{_SETTINGS_HELP}\n{describe_settings()}".rstrip("\n"))
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, that of the error, or 130 after Ctrl-C."""
    parser = _parser("stream-trainer", _DESCRIPTION, _COMMANDS)
    parser.add_argument("--version", action="version", version=f"stream-trainer {__version__}")
    parser.add_argument("command", choices=_HANDLERS, metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the command")
    try:
        known = parser.parse_args(argv)
        return _HANDLERS[known.command](known.arguments)
    except StreamTrainerError as error:
        _report(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _report(error: StreamTrainerError) -> None:
    """One line each, or one JSON object each where standard error has been taken over for that."""
    if hasattr(sys.stderr, "beneath"):
        from stream_trainer.monitoring.logs import report_mistake

        report_mistake(error)
        return
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)


def _parser(command: str, description: str, epilog: str = "", takes_settings: bool = False) -> _Parser:
    """The parser of one command. Settings are left over for `load_settings`; `--help` shows the first of them."""
    parser = _Parser(
        command,
        usage=f"{command} [--config FILE] [--section.name=VALUE ...]" if takes_settings else None,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=not takes_settings,
    )
    if takes_settings:
        add = parser.add_argument
        add("-h", "--help", action=_FirstSettings, nargs=0, help="show this and the first settings, and exit")
        add("--help-all", action=_AllSettings, nargs=0, help="show this and every setting, and exit")
        parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings")
    return parser


def _run(arguments: Sequence[str]) -> int:
    parser = _parser(
        "stream-trainer run", "Train from the stream until told to stop.", _RUN_EXAMPLES, takes_settings=True
    )
    _log_json_if(_format_asked_for(arguments))
    known, overrides = parser.parse_known_args(arguments)
    with _ending_on_sigterm():
        from stream_trainer.commands.check import check_offline, require
        from stream_trainer.monitoring.allocator import loading_for_good
        from stream_trainer.monitoring.logs import configure_logging
        from stream_trainer.monitoring.progress import announced
        from stream_trainer.settings.loading import load_settings

        settings = load_settings(known.config, overrides, _log_json_if)
        require(check_offline(settings))
        configure_logging(settings.log)
        with announced("loading libraries"), loading_for_good():
            from stream_trainer.service import run

        return run(settings)


def _format_asked_for(arguments: Sequence[str]) -> str:
    """`log.format` by command line and environment: mistakes in the settings are told of in it too."""
    asked = os.environ.get("STREAM_TRAINER_LOG__FORMAT", "")
    for name, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if name.startswith("--log.format"):
            asked = name.partition("=")[2] or following
    return asked


def _log_json_if(log_format: object) -> None:
    if log_format == "json":
        from stream_trainer.monitoring.logs import take_over_stderr

        take_over_stderr()


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Until the service has taken over, nothing has begun: SIGTERM ends the process at once, and that is no failure.

    Without a handler the first process of a container would not hear it at all.
    """
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _produce(arguments: Sequence[str]) -> int:
    from stream_trainer.commands.produce import add_arguments, run

    parser = _parser("stream-trainer produce", "Publish a JSONL file as records of a topic.")
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def _demo(arguments: Sequence[str]) -> int:
    from stream_trainer.demo.run import add_arguments, run

    parser = _parser("stream-trainer demo", "Broker, stream, training and report on this machine, in minutes.")
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def _select(arguments: Sequence[str]) -> int:
    parser = _parser("stream-trainer select", "Choose from a file of samples, once and offline.", _SELECT_METHODS)
    parser.add_argument("method", choices=("dual-sft", "cluster-ucb"), metavar="METHOD", help="see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="options of the method")
    known = parser.parse_args(arguments)
    if known.method == "dual-sft":
        from stream_trainer.commands.select_dual_sft import add_arguments, run
    else:
        from stream_trainer.commands.select_cluster_ucb import add_arguments, run
    method = _parser(f"stream-trainer select {known.method}", "Choose from a file of samples, once and offline.")
    add_arguments(method)
    return run(method.parse_args(known.arguments))


def _config(arguments: Sequence[str]) -> int:
    parser = _parser("stream-trainer config", "Show, check or describe the settings.", takes_settings=True)
    parser.usage = "stream-trainer config {show,check,schema} [--config FILE] [--section.name=VALUE ...]"
    parser.add_argument(
        "action",
        choices=("show", "check", "schema"),
        help="the settings in force, as YAML; whether all they name is there; the JSON schema of the file",
    )
    known, overrides = parser.parse_known_args(arguments)

    from stream_trainer.settings.help import schema, show
    from stream_trainer.settings.loading import load_settings

    if known.action == "schema":
        _print(json.dumps(schema(), indent=2))
        return 0
    settings = load_settings(known.config, overrides)
    if known.action == "show":
        _print(show(settings).rstrip("\n"))
        return 0

    from stream_trainer.commands.check import check_all, require
    from stream_trainer.commands.checking.unused import without_effect

    checks = check_all(settings)
    for check in checks:
        if check.ok:
            _print(f"ok: {check.name}: {check.detail}")
    for line in without_effect(settings):
        _print(f"note: {line}")
    require(checks)
    return 0


def _dead_letters(arguments: Sequence[str]) -> int:
    parser = _parser("stream-trainer dead-letters", "Show what could not be used, or publish it again.")
    parser.add_argument("action", choices=("inspect", "replay"), metavar="ACTION", help="inspect or replay")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the action")
    known = parser.parse_args(arguments)
    if known.action == "inspect":
        from stream_trainer.commands.dead_letters import EXAMPLES, add_arguments, run
    else:
        from stream_trainer.commands.replay_letters import EXAMPLES, add_arguments, run
    action = _parser(f"stream-trainer dead-letters {known.action}", parser.description or "", EXAMPLES)
    add_arguments(action)
    return _show(lambda: run(action.parse_args(known.arguments)))  # as it is read: there may be many values


def _replay(arguments: Sequence[str]) -> int:
    parser = _parser(
        "stream-trainer replay",
        "Make the steps between two checkpoints again, undisturbed, and compare weights and state to the bit.",
        _REPLAY_EXAMPLES,
        takes_settings=True,
    )
    parser.usage = f"{parser.prog} --from CHECKPOINT --to CHECKPOINT [--config FILE] [--section.name=VALUE ...]"
    what = "checkpoint to {}: its name in checkpoint.dir, or a path"
    parser.add_argument("--from", dest="first", required=True, metavar="CHECKPOINT", help=what.format("begin with"))
    parser.add_argument("--to", dest="last", required=True, metavar="CHECKPOINT", help=what.format("end at"))
    scratch = "directory for what is made again; the system's for temporary files unless given"
    parser.add_argument("--scratch", type=Path, metavar="DIR", help=scratch)
    known, overrides = parser.parse_known_args(arguments)
    from stream_trainer.monitoring.logs import configure_logging
    from stream_trainer.settings.loading import load_settings

    settings = load_settings(known.config, overrides)
    configure_logging(settings.log.model_copy(update={"level": max(settings.log.level, "WARNING", key=_LEVELS.index)}))

    from stream_trainer.replay import run

    return run(settings, known.first, known.last, known.scratch)


def _models(arguments: Sequence[str]) -> int:
    from stream_trainer.commands.models import EXAMPLES, add_arguments, run

    parser = _parser("stream-trainer models", "See published versions, and say which one is current.", EXAMPLES)
    add_arguments(parser)
    known, overrides = parser.parse_known_args(arguments)
    return _answer(lambda: run(known, overrides))


def _ledger(arguments: Sequence[str]) -> int:
    from stream_trainer.commands.ledger import EXAMPLES, add_arguments, run

    parser = _parser("stream-trainer ledger", "Which records were trained on, and by which models.", EXAMPLES)
    add_arguments(parser)
    known, overrides = parser.parse_known_args(arguments)
    return _answer(lambda: run(known, overrides))


def _ctl(arguments: Sequence[str]) -> int:
    from stream_trainer.commands.ctl import EXAMPLES, add_arguments, run

    parser = _parser("stream-trainer ctl", "Give an order to a trainer that runs.", EXAMPLES)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings, with address and token")
    add_arguments(parser)
    known, overrides = parser.parse_known_args(arguments)
    return _answer(lambda: run(known, overrides))


_HANDLERS: dict[str, Callable[[Sequence[str]], int]] = {
    "run": _run,
    "produce": _produce,
    "demo": _demo,
    "select": _select,
    "config": _config,
    "dead-letters": _dead_letters,
    "replay": _replay,
    "models": _models,
    "ledger": _ledger,
    "ctl": _ctl,
}


def _answer(ask: Callable[[], int]) -> int:
    """Let a command say all it has to say before any of it is shown: a reader that leaves is no failure of it."""
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            return ask()
    finally:
        if said.getvalue():
            _print(said.getvalue().rstrip("\n"))


def _print(text: str) -> None:
    _show(lambda: sys.stdout.write(f"{text}\n"))


def _show(tell: Callable[[], int]) -> int:
    """What `tell` returns, or 0 if who reads standard output (`head`, say) has seen enough: that is no failure."""
    try:
        code = tell()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code
