"""SIGTERM in states that `test_stops` cannot reach by waiting: the last checkpoint is whole, the code 0, and soon.

Starting, loading, idle and with a full buffer are there.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_selectors import SelectionEngine
from gradient_selectors.weigh.coefficients import CoefficientSolver

from stream_trainer.service import run
from stream_trainer.settings.schema import Settings
from stream_trainer.training import evaluations
from stream_trainer.training.faults.steps import Steps
from tests.helpers.brokers import ApacheKafka, create_topic, prepare_kafka, publish, running, why_no_apache_kafka
from tests.helpers.service import (
    LONG_S,
    command,
    configuration,
    decided,
    goods,
    jsonl,
    kafka,
    on_free_port,
    state_of,
    wait_for,
    write_lines,
)
from tests.system.faults.ends import is_whole, newest, trainer_of

RECORDS, POOL = 120, 8
SOON_S = 20.0


class Alarm:
    """Sends SIGTERM at the n-th call of what it is put in place of, from step `after` on, and remembers when."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: Any, name: str, n: int, after: int) -> None:
        self._inner, self._left = getattr(owner, name), n
        self.rang: float | None = None
        self._steps = 0
        alarm, make = self, Steps.make

        def step(*args: Any, **options: Any) -> Any:
            alarm._steps += 1
            return make(*args, **options)

        def called(*args: Any, **options: Any) -> Any:
            alarm._left -= alarm._steps >= after
            if alarm._left == 0:
                alarm.rang = time.monotonic()
                os.kill(os.getpid(), signal.SIGTERM)
            return alarm._inner(*args, **options)

        patch.setattr(Steps, "make", step)
        patch.setattr(owner, name, called)


@pytest.mark.parametrize(
    ("owner", "name", "n", "after"),
    [
        (SelectionEngine, "backward", 5, 1),
        (torch.autograd, "backward", 5, 1),
        (CoefficientSolver, "solve", 5, 1),
        (torch.nn.utils, "clip_grad_norm_", 5, 1),  # the update follows
        (os, "fsync", 4, 3),  # the checkpoint that comes after the third step
        (os, "rename", 1, 3),
        (os, "unlink", 1, 6),  # when the one after the ninth is made, that before the first goes
        (evaluations, "mean_loss", 1, 0),  # the evaluation before the first step
        (evaluations, "mean_loss", 1, 4),  # and that after the fourth
    ],
    ids=[
        "scoring",
        "capture",
        "solving",
        "updating",
        "syncing",
        "renaming",
        "pruning",
        "evaluating first",
        "evaluating",
    ],
)
def test_sigterm_within_whatever_the_trainer_does(
    owner: Any, name: str, n: int, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "samples.jsonl", goods(RECORDS))
    checkpoint, evaluation = {"every_steps": 3}, {"every_steps": 4, "retention_path": str(tmp_path / "target.jsonl")}
    config = configuration(tmp_path, jsonl(tmp_path / "samples.jsonl"), checkpoint=checkpoint, evaluation=evaluation)
    alarm = Alarm(monkeypatch, owner, name, n, after)
    assert run(Settings(**config)) == 0
    assert alarm.rang is not None
    assert time.monotonic() - alarm.rang < SOON_S
    kept = newest(config)
    assert is_whole(kept)
    assert not list(kept.parent.glob(".*")), "nothing half written or half deleted stays"
    step = trainer_of(kept)["step"]
    assert 0 < step < RECORDS // POOL if after else step == 0
    assert sum(trainer_of(kept)["cursor"]["counts"].values()) == POOL * step


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ApacheKafka, subprocess.Popen[bytes]]]:
    if reason := why_no_apache_kafka():
        pytest.skip(reason)
    kafka = prepare_kafka(tmp_path_factory.mktemp("broker"))
    with running(kafka) as process:
        yield kafka, process


def hang(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGSTOP)


def go_on(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGCONT)


def die(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(("trouble", "after"), [(hang, go_on), (die, lambda _: None)], ids=["hanging", "dead"])
def test_sigterm_while_no_broker_answers(
    trouble: Callable[[subprocess.Popen[bytes]], None],
    after: Callable[[subprocess.Popen[bytes]], None],
    broker: tuple[ApacheKafka, subprocess.Popen[bytes]],
    topic: str,
    tmp_path: Path,
) -> None:
    """The commit that nobody takes is left out; what was learned is kept."""
    (servers, process), bad = (broker[0].bootstrap_servers, broker[1]), [b"not JSON"] * 10
    create_topic(servers, topic)
    publish(servers, topic, goods(RECORDS) + bad)
    config = on_free_port(configuration(tmp_path, kafka(servers, topic, stop_at_end=False), buffer={"wait_s": 1.0}))
    with command(tmp_path, config) as service:
        wait_for(lambda: decided(config) == RECORDS + len(bad) and state_of(config) == "idle")
        trouble(process)
        service.terminate()
        started = time.monotonic()
        code = service.wait(LONG_S)
        seconds = time.monotonic() - started
    after(process)
    assert code == 0
    assert seconds < SOON_S
    assert is_whole(newest(config))
    assert sum(trainer_of(newest(config))["cursor"]["counts"].values()) == RECORDS + len(bad)
