"""Start what `compose.yaml` would, as plain processes on this machine, and see that it works: `make deploy-check`.

Kafka, the trainer, Prometheus and Alertmanager run with the files of this folder, in which only addresses, the model
and waiting times are changed. Prometheus has to scrape the trainer, every query of the dashboards has to be answered,
and an alert has to fire when the broker is killed and to resolve when it is back. Prints the seconds that each took.

Needs `prometheus` and `prometheus-alertmanager` (or `alertmanager`) on the PATH, and an Apache Kafka at KAFKA_HOME.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stream_trainer.demo.broker import free_port
from tests.helpers.brokers import ApacheKafka, create_topic, prepare_kafka, publish, running, stop, why_no_apache_kafka

DEPLOY = Path(__file__).parent
ALERT = "StreamTrainerSourceAway"
TRAINER = "import sys; from stream_trainer.cli import main; sys.exit(main())"
PATIENCE_S = 240.0
LAST_LINES = 3
RECORDS = 4000
MODEL = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@dataclass(frozen=True)
class Stack:
    """What runs: base addresses without a slash at the end, and the broker."""

    trainer: str
    prometheus: str
    alertmanager: str
    kafka: ApacheKafka


def main() -> int:
    """Exit code 0 if all is well, 1 if something did not come about, 2 if something is not installed."""
    if missing := what_is_missing():
        print(f"error: {missing}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="stream-trainer-deploy-") as folder:
        try:
            report = check(Path(folder))
        except TimeoutError as error:
            print(f"error: {error}\n{last_words(Path(folder))}", file=sys.stderr)
            return 1
    print(json.dumps(report, indent=2))
    return 0


def what_is_missing() -> str | None:
    """None if everything is there."""
    if reason := why_no_apache_kafka():
        return reason
    if shutil.which("prometheus") is None or find_alertmanager() is None:
        return "prometheus or alertmanager is not on the PATH"
    return None


def find_alertmanager() -> str | None:
    """Debian calls it by another name."""
    return shutil.which("alertmanager") or shutil.which("prometheus-alertmanager")


def check(folder: Path) -> dict[str, Any]:
    """Seconds until each thing came about. Raises TimeoutError, naming it, if it did not."""
    took: dict[str, Any] = {}
    with ExitStack() as up:
        broker = ExitStack()
        up.push(broker)
        kafka = prepare_kafka(folder)
        broker.enter_context(running(kafka))
        stack = start(folder, kafka, up)
        took["scraped"] = waiting("up == 1", lambda: value(stack, 'up{job="stream-trainer"}') == [1.0])
        took["trained"] = waiting("a step", lambda: value(stack, "stream_trainer_steps_total > 3") != [])
        for query in dashboard_queries():
            waiting(query, lambda query=query: answered(stack, query))  # type: ignore[misc]
        for query in dashboard_queries(of_some_runs=True):
            series(stack, query)
        took["dashboard queries answered"] = len(dashboard_queries())
        broker.close()
        took["alert fired after the broker was killed"] = waiting(ALERT, lambda: firing(stack))
        took["alert reached Alertmanager"] = waiting("Alertmanager", lambda: notified(stack))
        broker.enter_context(running(kafka))
        took["alert resolved after the broker was back"] = waiting("its end", lambda: not firing(stack))
        took["alert left Alertmanager"] = waiting("its end", lambda: not notified(stack))
    return took


def start(folder: Path, kafka: ApacheKafka, up: ExitStack) -> Stack:
    """Everything but the broker, which runs, until `up` is closed."""
    ports = {name: free_port() for name in ("trainer", "prometheus", "alertmanager")}
    settings = trainer_settings(folder, kafka, ports["trainer"])
    topic = settings["source"]["kafka"]["topic"]
    create_topic(kafka.bootstrap_servers, topic)
    lines = (DEPLOY / "target.jsonl").read_bytes().splitlines()
    publish(kafka.bootstrap_servers, topic, [lines[i % len(lines)] for i in range(RECORDS)])
    config = write_yaml(folder / "trainer.yaml", settings)
    up.enter_context(process(folder, "trainer", sys.executable, "-c", TRAINER, "run", f"--config={config}"))
    up.enter_context(
        process(
            folder,
            "alertmanager",
            find_alertmanager() or "",
            f"--config.file={DEPLOY / 'alertmanager' / 'alertmanager.yml'}",
            f"--storage.path={folder / 'alertmanager'}",
            f"--web.listen-address=127.0.0.1:{ports['alertmanager']}",
            "--cluster.listen-address=",
        )
    )
    up.enter_context(
        process(
            folder,
            "prometheus",
            "prometheus",
            f"--config.file={prometheus_config(folder, ports)}",
            f"--storage.tsdb.path={folder / 'prometheus'}",
            f"--web.listen-address=127.0.0.1:{ports['prometheus']}",
        )
    )
    trainer, prometheus, alertmanager = (f"http://127.0.0.1:{port}" for port in ports.values())
    return Stack(trainer, prometheus, alertmanager, kafka)


def trainer_settings(folder: Path, kafka: ApacheKafka, port: int) -> dict[str, Any]:
    """Those of compose, with a model that is made here, and everything in `folder`."""
    settings: dict[str, Any] = yaml.safe_load((DEPLOY / "trainer.yaml").read_text())
    settings["source"]["kafka"] |= {"bootstrap_servers": kafka.bootstrap_servers, "discovery_interval_s": 1.0}
    settings["model"] = {"config": MODEL, "tokenizer": "bytes"}
    settings["target"]["path"] = str(DEPLOY / "target.jsonl")
    settings["checkpoint"]["dir"] = str(folder / "checkpoints")
    settings["dead_letters"]["path"] = str(folder / "dead-letters.jsonl")
    settings["server"]["port"] = port
    settings["training"] = {"threads": 1}
    return settings


def prometheus_config(folder: Path, ports: dict[str, int]) -> Path:
    """That of compose with the addresses of here, a scrape every second, and alerts that wait for a second."""
    text = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
    for service, port in (("trainer", 9464), ("alertmanager", 9093)):
        assert f"{service}:{port}" in text
        text = text.replace(f"{service}:{port}", f"127.0.0.1:{ports[service]}")
    config = yaml.safe_load(text)
    config["global"] |= {"scrape_interval": "1s", "evaluation_interval": "1s"}
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            if "for" in rule:
                rule["for"] = "1s"
    write_yaml(folder / "alerts.yml", rules)
    return write_yaml(folder / "prometheus.yml", config)


def write_yaml(path: Path, content: Any) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


@contextmanager
def process(folder: Path, name: str, *command: str) -> Iterator[None]:
    """Runs until the block ends; what it says is in `folder/NAME.log`."""
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with (folder / f"{name}.log").open("wb") as log:
        running_process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | paths)
    try:
        yield
    finally:
        stop(running_process)


def waiting(what: str, condition: Callable[[], bool]) -> float:
    """Seconds until it holds; it does not while nobody answers. Raises TimeoutError."""
    begun = time.monotonic()
    while not holds(condition):
        if time.monotonic() - begun > PATIENCE_S:
            raise TimeoutError(f"waited {PATIENCE_S:g} s in vain for {what}")
        time.sleep(0.2)
    return round(time.monotonic() - begun, 1)


def holds(condition: Callable[[], bool]) -> bool:
    try:
        return condition()
    except OSError:
        return False


def last_words(folder: Path) -> str:
    """The end of every log."""
    ends = {
        log.name: log.read_text(errors="replace").splitlines()[-LAST_LINES:] for log in sorted(folder.glob("*.log"))
    }
    return "\n".join(f"{name}: {line}" for name, lines in ends.items() for line in lines)


def get(address: str) -> Any:
    """The JSON there. Raises OSError while nobody answers."""
    with urllib.request.urlopen(address, timeout=10) as answer:
        return json.load(answer)


def series(stack: Stack, query: str) -> list[Any]:
    found = get(f"{stack.prometheus}/api/v1/query?query={urllib.parse.quote(query)}")
    result: list[Any] = found["data"]["result"]
    return result


def value(stack: Stack, query: str) -> list[float]:
    return [float(one["value"][1]) for one in series(stack, query)]


def firing(stack: Stack) -> bool:
    return series(stack, f'ALERTS{{alertname="{ALERT}", alertstate="firing"}}') != []


def notified(stack: Stack) -> bool:
    alerts = get(f"{stack.alertmanager}/api/v2/alerts?active=true")
    return any(alert["labels"]["alertname"] == ALERT for alert in alerts)


def dashboard_queries(*, of_some_runs: bool = False) -> list[str]:
    """Of every panel and mark of every dashboard, with Grafana's variables filled in.

    Those below a row `With ...` have data in runs of such settings only: they are asked for by `of_some_runs`.
    """
    queries: list[str] = []
    for path in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        dashboard, row = json.loads(path.read_text()), ""
        for panel in dashboard["panels"]:
            row = panel["title"] if panel["type"] == "row" else row
            if row.startswith("With ") == of_some_runs:
                queries += [target["expr"] for target in panel.get("targets", [])]
        if not of_some_runs:
            queries += [mark["expr"] for mark in dashboard["annotations"]["list"]]
    return [query.replace("$__rate_interval", "10s").replace("$instance", ".*") for query in queries]


def answered(stack: Stack, query: str) -> bool:
    """Whether it has data; what compares may rightly have none, so it is asked without the comparison."""
    return series(stack, re.sub(r"\s*(==|>|<|>=|<=)\s*[\d.e]+", "", query)) != []


if __name__ == "__main__":
    sys.exit(main())
