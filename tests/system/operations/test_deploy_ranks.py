"""The examples of several processes: torchrun takes their options, settings their variables, and a stop has time."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from stream_trainer.settings.loading import load_settings
from stream_trainer.settings.schema import Settings
from tests.helpers.service import LONG_S, wait_for
from tests.system.operations.test_deploy import DEPLOY, compose, image_environment, mounts

RANKS = DEPLOY / "ranks"
IN_THE_CONTAINER = "/etc/stream-trainer/trainer.yaml"


def over() -> Any:
    return yaml.safe_load((RANKS / "compose.yaml").read_text())["services"]["trainer"]


def kubernetes(name: str) -> Any:
    return yaml.safe_load((RANKS / "kubernetes" / f"{name}.yaml").read_text())


def pod() -> Any:
    return kubernetes("job")["spec"]["template"]["spec"]


def container() -> Any:
    (found,) = pod()["containers"]
    return found


def loaded(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in (image_environment() | variables).items():
        if name.startswith("STREAM_TRAINER_"):
            monkeypatch.setenv(name, value)
    return load_settings(mounts(compose()["services"]["trainer"])[IN_THE_CONTAINER], [])


def launched(arguments: list[str]) -> Any:
    """What torchrun understands of its arguments. They must run the service with the file that is mounted."""
    found = get_args_parser().parse_args(arguments)
    assert (found.module, found.training_script) == (True, "stream_trainer")
    assert found.training_script_args == ["run", f"--config={IN_THE_CONTAINER}"]
    return found


def seconds(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([ms])", text).groups()  # type: ignore[union-attr]
    return int(number) * {"m": 60, "s": 1}[unit]


def test_compose_runs_all_gpus_of_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = over()
    assert trainer["entrypoint"] == ["torchrun"]
    found = launched(trainer["command"])
    assert (found.standalone, found.nproc_per_node) == (True, "gpu")
    assert found.max_restarts == 0 or trainer["environment"]["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert 30 < found.shutdown_timeout < seconds(trainer["stop_grace_period"])
    settings = loaded(compose()["services"]["trainer"]["environment"] | trainer["environment"], monkeypatch)
    assert (settings.distributed.mode, settings.model.device) == ("replicated", "cuda")


def test_the_job_runs_a_pod_a_node_on_shared_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    job, service, claim = (kubernetes(name) for name in ("job", "service", "claim"))
    spec = job["spec"]
    (line,) = re.findall(r"torchrun (.*?--config=\S+)", container()["args"][0].replace("\\\n", " "), re.DOTALL)
    found = launched(line.replace('"$JOB_COMPLETION_INDEX"', "1").split())
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(found.nnodes)
    assert pod()["subdomain"] == service["metadata"]["name"]
    assert found.master_addr == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert found.master_port == service["spec"]["ports"][0]["port"] == container()["ports"][0]["containerPort"]
    assert service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    assert found.shutdown_timeout < pod()["terminationGracePeriodSeconds"]
    assert found.max_restarts == 0  # the loop starts all nodes again
    settings = loaded({entry["name"]: entry["value"] for entry in container()["env"]}, monkeypatch)
    assert (settings.distributed.mode, settings.model.device) == ("replicated", "cuda")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    volumes = {volume["name"]: volume for volume in pod()["volumes"]}
    assert volumes["data"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert {mount["name"] for mount in container()["volumeMounts"]} == set(volumes)
    places = {mount["name"]: mount["mountPath"] for mount in container()["volumeMounts"]}
    assert str(settings.checkpoint.dir).startswith(places["data"])
    assert str(settings.target.path).startswith(places["settings"])


def test_a_pod_begins_again_until_it_is_told_to_stop_and_then_ends_in_a_checkpoint(tmp_path: Path) -> None:
    """The scripts of the job, with a torchrun that stands for the real one."""
    stop, log = tmp_path / "stop", tmp_path / "log"
    worker = tmp_path / "stream_trainer.py"
    worker.write_text(
        "import pathlib, signal, sys, time\n"
        f"log = pathlib.Path({str(log)!r})\n"
        "def end(*_):\n    time.sleep(1)\n    log.write_text(log.read_text() + 'saved\\n')\n    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "log.write_text((log.read_text() if log.exists() else '') + 'began\\n')\n"
        "time.sleep(0 if log.read_text().count('began') < 2 else 600)\n"
    )
    launcher = tmp_path / "torchrun"
    launcher.write_text(f"#!/bin/sh\nPYTHONPATH={tmp_path} {sys.executable} -m stream_trainer run --config=elsewhere\n")
    launcher.chmod(0o755)
    scripts = [container()["args"][0], container()["lifecycle"]["preStop"]["exec"]["command"][-1]]
    main, ending = (script.replace("/tmp/stop", str(stop)) for script in scripts)
    variables = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": "0", "PAUSE_S": "0"}
    # Not the services that other tests run on this machine: only the one of this folder.
    ending = ending.replace('*"-m stream_trainer run "*', '*"-m stream_trainer run --config=elsewhere"*')
    with subprocess.Popen(["/bin/sh", "-c", main], env=variables, cwd=tmp_path) as process:
        wait_for(lambda: log.exists() and log.read_text().count("began") == 2)
        began = time.monotonic()
        subprocess.run(["/bin/sh", "-c", ending], check=True, timeout=LONG_S)
        assert log.read_text().endswith("saved\n")  # it waited for the checkpoint
        assert process.wait(LONG_S) == 0
        assert time.monotonic() - began < LONG_S
    assert log.read_text().count("began") == 2
