"""What is deployed agrees with the settings: files load, variables are known, ports match."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from stream_trainer.cli import main
from stream_trainer.monitoring.metrics import Metrics
from stream_trainer.samples.decoder import REASONS
from stream_trainer.settings.loading import load_settings
from stream_trainer.settings.schema import Settings

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"


def compose() -> Any:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def dockerfile() -> dict[str, list[str]]:
    """Instruction -> its arguments, in order; continued lines joined."""
    text = re.sub(r"\\\n\s*", "", (DEPLOY / "Dockerfile").read_text())
    lines = [line.partition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    found: dict[str, list[str]] = {}
    for instruction, _, rest in lines:
        found.setdefault(instruction, []).append(rest.strip())
    return found


def image_environment() -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(dockerfile()["ENV"])))


def mounts(service: Any) -> dict[str, Path]:
    """Path in the container -> file in this folder."""
    pairs = (mount.split(":")[:2] for mount in service["volumes"])
    return {inside: DEPLOY / outside for outside, inside in pairs if outside.startswith("./")}


def trainer_settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings the trainer's container loads."""
    trainer = compose()["services"]["trainer"]
    for name, value in (image_environment() | trainer["environment"]).items():
        if name.startswith("STREAM_TRAINER_"):
            monkeypatch.setenv(name, str(value))
    command, option, file = trainer["command"]
    assert (command, option) == ("run", "--config")
    return load_settings(mounts(trainer)[file], [])


YAML = [path for path in sorted(DEPLOY.rglob("*.y*ml")) if path.parent.name != "templates"]  # these are Helm's


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_every_file_is_yaml_with_content(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_the_trainer_loads_its_settings_and_finds_the_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = trainer_settings(monkeypatch)
    services = compose()["services"]
    assert f"--topic={settings.source.kafka.topic}" in services["topic"]["command"]
    assert f"--bootstrap-server={settings.source.kafka.bootstrap_servers}" in services["topic"]["command"]
    advertised = services["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    assert f"INTERNAL://{settings.source.kafka.bootstrap_servers}" in advertised.split(",")
    assert settings.log.format == "json"


def test_files_that_are_mounted_exist_and_are_those_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for service in compose()["services"].values():
        if "volumes" in service:
            dashboards = DEPLOY / "grafana" / "dashboards"
            assert all(path.is_file() for path in mounts(service).values() if path != dashboards)
            assert list(dashboards.glob("*.json"))
    target = mounts(compose()["services"]["trainer"])[str(trainer_settings(monkeypatch).target.path)]
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert all(set(row) == {"prompt", "response"} for row in rows)


def test_what_is_written_lies_on_a_volume(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = trainer_settings(monkeypatch)
    volumes = [Path(mount.split(":")[1]) for mount in compose()["services"]["trainer"]["volumes"] if mount[0] != "."]
    for path in (settings.checkpoint.dir, settings.dead_letters.path, Path(image_environment()["HF_HOME"])):
        assert any(path.is_relative_to(volume) for volume in volumes)
    assert set(compose()["volumes"]) == {"kafka", "trainer", "prometheus", "alertmanager", "grafana"}


def test_services_come_back_after_a_reboot_and_the_job_that_ends_does_not() -> None:
    """The trainer waits until the job has ended; a job that is started again for ever never has."""
    services = compose()["services"]
    waits = {name: how["condition"] for name, how in services["trainer"]["depends_on"].items()}
    assert waits == {"topic": "service_completed_successfully"}
    assert {name: service["restart"] for name, service in services.items()} == {
        "kafka": "unless-stopped",
        "topic": "on-failure",
        "trainer": "unless-stopped",
        "prometheus": "unless-stopped",
        "alertmanager": "unless-stopped",
        "grafana": "unless-stopped",
    }


def test_prometheus_scrapes_the_port_that_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    server = trainer_settings(monkeypatch).server
    scrape = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    assert [job["static_configs"][0]["targets"] for job in scrape] == [[f"trainer:{server.port}"]]
    assert server.host == "0.0.0.0"
    assert compose()["services"]["trainer"]["ports"] == [f"127.0.0.1:{server.port}:{server.port}"]
    assert dockerfile()["EXPOSE"] == [str(server.port)]


def test_the_image_runs_the_command_without_privileges() -> None:
    image = dockerfile()
    assert json.loads(image["ENTRYPOINT"][0]) == ["stream-trainer"]
    assert json.loads(image["CMD"][0]) == ["run"]
    assert image["USER"] == ["10001:10001"]
    assert "http://127.0.0.1:9464/healthz" in image["HEALTHCHECK"][0]
    assert image["VOLUME"] == ["/data"]


def test_images_are_pinned() -> None:
    images = [service["image"] for service in compose()["services"].values() if "build" not in service]
    (base,) = (value for name, _, value in (arg.partition("=") for arg in dockerfile()["ARG"]) if name == "BASE")
    assert {image.split()[0] for image in dockerfile()["FROM"]} == {"${BASE}"}
    for image in [*images, base]:
        assert re.search(r":v?\d+\.\d+\.\d+", image), image


def test_what_the_image_copies_is_let_through() -> None:
    lines = (ROOT / ".dockerignore").read_text().split()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copies = [copy for copy in dockerfile()["COPY"] if not copy.startswith("--from=build")]
    copied = {name for copy in copies for name in copy.split()[:-1]}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.parametrize("config", [DEPLOY / "trainer.yaml", ROOT / "examples" / "stream-trainer.yaml"])
def test_files_of_settings_are_accepted_by_the_command(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", f"--config={config}"]) == 0
    assert "topic: samples" in capsys.readouterr().out


def alerts() -> dict[str, Any]:
    """Alerts by name."""
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


def recorded() -> dict[str, str]:
    """Recording rules: expressions by name."""
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    return {rule["record"]: rule["expr"] for group in groups for rule in group["rules"] if "record" in rule}


def unrecorded(query: str) -> str:
    """A query with what is recorded written out."""
    for name, expr in recorded().items():
        if name in query:
            query = query.replace(name, unrecorded(expr))
    return query


def known_labels(metrics: Metrics, series: str, label: str) -> set[str]:
    """The values of a label that there are from the start."""
    families = [family for family in metrics.registry.collect() if family.name.startswith("stream_trainer_")]
    return {sample.labels[label] for family in families for sample in family.samples if sample.name == series}


def test_alerts_are_on_series_that_exist_before_anything_happened() -> None:
    metrics = Metrics(REASONS)
    for numbers in (metrics.lag, metrics.decided_offset, metrics.retention_remaining):
        numbers.set(0, "log", "0")  # known once the stream is
    metrics.retention.labels("log")
    for gauge in (metrics.forgetting, metrics.evaluation_time):
        gauge.labels("target")  # measured before anything else
    names = {sample.name for family in metrics.registry.collect() for sample in family.samples}
    for name, alert in alerts().items():
        expr = unrecorded(alert["expr"])
        assert set(re.findall(r"\bstream_trainer_\w+\b(?!=)", expr)) <= names, name
        for series, selected in re.findall(r"(stream_trainer_\w+)\{([^}]*)\}", expr):
            for label, _, value in re.findall(r'(\w+)(=~?|!=)"(\S+)"', selected):
                if label != "set":  # the names of sets are the user's
                    assert set(value.split("|")) <= known_labels(metrics, series, label), name


def test_every_alert_leads_to_what_to_do() -> None:
    for name, alert in alerts().items():
        page, _, section = alert["annotations"]["runbook"].partition("#")
        headings = re.findall(r"^## (.*)$", (ROOT / page).read_text(), flags=re.MULTILINE)
        assert section in {heading.lower().replace(" ", "-") for heading in headings}, name
        assert alert["annotations"]["summary"].endswith(".")
        assert alert["labels"]["severity"] in ("info", "warning", "critical")


def test_every_alert_has_a_test_of_promtool() -> None:
    """One in which it fires, and one in which it does not."""
    cases = yaml.safe_load((DEPLOY / "prometheus" / "alerts_test.yml").read_text())["tests"]
    fires, is_silent = set[str](), set[str]()
    for case in cases:
        for one in case.get("alert_rule_test", []):
            (fires if one.get("exp_alerts") else is_silent).add(one["alertname"])
        all_silent = False
        for one in case.get("promql_expr_test", []):
            named = set(re.findall(r'alertname="(\w+)"', one["expr"]))
            if named:
                (fires if one["exp_samples"] != [{"value": 0}] else is_silent).update(named)
            all_silent |= not named and one["exp_samples"] == [{"value": 0}]
            listed = {
                re.findall(r'"(\w+)"', sample.get("labels", ""))[0]
                for sample in one["exp_samples"]
                if "labels" in sample
            }
            fires |= listed
            is_silent |= listed if all_silent else set()
    assert fires == is_silent == set(alerts())


def test_recording_rules_are_named_by_level_metric_and_operation() -> None:
    assert len(recorded()) > 3
    for name in recorded():
        assert re.fullmatch(r"instance:stream_trainer_[a-z_]+:[a-z0-9_]+", name)


def test_prometheus_is_given_the_alerts() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    folder = Path("/etc/prometheus")
    for name in config["rule_files"]:
        mounted = mounts(compose()["services"]["prometheus"])[str(folder / name)]
        assert mounted.resolve() == DEPLOY / "prometheus" / name


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool, of Prometheus, is not on the PATH")
@pytest.mark.parametrize(
    "arguments", [["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]], ids=["check", "test"]
)
def test_promtool_accepts_the_configuration(arguments: list[str]) -> None:
    folder = DEPLOY / "prometheus"
    check = subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True, timeout=60)
    assert check.returncode == 0, check.stdout + check.stderr
