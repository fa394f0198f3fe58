"""Chart, locks and dashboards agree with what they are of; engines check them where they are installed."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from deploy.lock import EXTRAS, OF_TORCH, split
from stream_trainer.monitoring.metrics import Metrics, State
from stream_trainer.samples.decoder import REASONS
from stream_trainer.settings.schema import Settings

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "stream-trainer"
LOCKS = (DEPLOY / "requirements.lock", DEPLOY / "torch-cuda.lock")
EVERYTHING = """\
image: {digest: "sha256:%s", pullSecrets: [registry]}
secretVariables:
  STREAM_TRAINER_SOURCE__KAFKA__SASL_PASSWORD: {name: kafka-client, key: password}
secretFolders: {/etc/kafka: kafka-tls}
variables: {HF_HUB_OFFLINE: "1"}
persistence: {storageClass: fast, accessMode: ReadWriteOncePod}
serviceMonitor: {enabled: true, labels: {release: prometheus}}
""" % ("a" * 64)


def values() -> Any:
    return yaml.safe_load((CHART / "values.yaml").read_text())


def schema_accepts(file: Path, *schema: str) -> bool:
    command = [sys.executable, "-m", "check_jsonschema", *schema, str(file)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


# The chart.


def test_the_charts_values_are_what_the_schema_takes(tmp_path: Path) -> None:
    pytest.importorskip("check_jsonschema")
    schema = ("--schemafile", str(CHART / "values.schema.json"))
    assert schema_accepts(CHART / "values.yaml", *schema)
    for number, (text, good) in enumerate(
        [
            (EVERYTHING, True),
            ("replicas: 2\n", False),
            ("image: {digest: latest}\n", False),
            ("persistence: {accessMode: ReadWriteMany}\n", False),
            ("secretVariables: {PASSWORD: hunter2}\n", False),
        ]
    ):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        assert schema_accepts(file, *schema) == good, text


def test_the_charts_settings_are_the_trainers() -> None:
    settings = Settings.model_validate(values()["settings"])
    for path in (settings.checkpoint.dir, settings.dead_letters.path):
        assert path.is_relative_to("/data")
    folder, _, name = str(settings.target.path).rpartition("/")
    assert folder == "/etc/stream-trainer"
    assert all("prompt" in json.loads(line) for line in values()["files"][name].splitlines())


def test_what_templates_ask_for_is_among_the_values() -> None:
    known = values()
    for template in sorted((CHART / "templates").iterdir()):
        for path in re.findall(r"\.Values\.([\w.]+)", template.read_text()):
            at: Any = known
            for name in path.split("."):
                assert name in at, f"{template.name}: {path}"
                at = at[name]


def test_one_trainer_owns_the_volume_and_can_do_no_more_than_it_must() -> None:
    text = (CHART / "templates" / "statefulset.yaml").read_text()
    for line in (
        "kind: StatefulSet",
        "replicas: 1",
        "runAsNonRoot: true",
        "readOnlyRootFilesystem: true",
        "allowPrivilegeEscalation: false",
        'drop: ["ALL"]',
        "type: RuntimeDefault",
        "automountServiceAccountToken: false",
        "secretKeyRef:",
    ):
        assert line in text
    for probe, path in (("startup", "healthz"), ("liveness", "healthz"), ("readiness", "readyz")):
        assert re.search(rf"{probe}Probe:\n\s+httpGet:\n\s+path: /{path}\n", text)


def test_the_chart_has_the_packages_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == project["version"]


@pytest.mark.skipif(shutil.which("helm") is None, reason="helm is not on the PATH")
@pytest.mark.parametrize("given", ["", EVERYTHING], ids=["as it is", "everything on"])
def test_helm_renders_what_kubernetes_takes(given: str, tmp_path: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    file = tmp_path / "values.yaml"
    file.write_text(given)
    subprocess.run(["helm", "lint", "--strict", str(CHART), "--values", str(file)], check=True, timeout=60)
    command = ["helm", "template", "demo", str(CHART), "--values", str(file)]
    rendered = subprocess.run(command, check=True, timeout=60, stdout=subprocess.PIPE, text=True).stdout
    objects = [found for found in yaml.safe_load_all(rendered) if found]
    kinds = {found["kind"] for found in objects}
    assert kinds >= {"StatefulSet", "Service", "ConfigMap", "ServiceAccount", "NetworkPolicy", "PodDisruptionBudget"}
    assert ("ServiceMonitor" in kinds) == bool(given)
    for found in objects:
        if found["kind"] != "ServiceMonitor":  # its schema is the operator's
            validate.validate(found, "1.31", strict=True)


# What the other engines say.


def test_compose_is_what_the_specification_takes() -> None:
    pytest.importorskip("check_jsonschema")
    assert schema_accepts(DEPLOY / "compose.yaml", "--builtin-schema", "vendor.compose-spec")


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not on the PATH")
def test_hadolint_has_nothing_to_say() -> None:
    found = subprocess.run(["hadolint", str(DEPLOY / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.skipif(shutil.which("amtool") is None, reason="amtool, of Alertmanager, is not on the PATH")
def test_alertmanager_takes_its_file() -> None:
    file = DEPLOY / "alertmanager" / "alertmanager.yml"
    assert subprocess.run(["amtool", "check-config", str(file)], capture_output=True, timeout=60).returncode == 0


# The locks.


def locked() -> dict[str, str]:
    """Version by name, of both locks."""
    packages = [package for lock in LOCKS for package in split(lock.read_text())]
    return dict(re.match(r"([\w.-]+)==([^\s;]+)", package).groups() for package in packages)  # type: ignore[union-attr, misc]


def demanded() -> list[Requirement]:
    """What both packages require, with the image's extras."""
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    library = tomllib.loads((ROOT / "selectors" / "pyproject.toml").read_text())["project"]
    extras = own["optional-dependencies"]
    texts = own["dependencies"] + library["dependencies"] + [text for extra in EXTRAS for text in extras[extra]]
    return [Requirement(text) for text in texts if not text.startswith("gradient-selectors")]


def test_the_lock_satisfies_what_is_required() -> None:
    found = locked()
    for requirement in demanded():
        assert requirement.name in found, f"{requirement.name} is not locked; run make lock"
        assert Version(found[requirement.name]) in requirement.specifier, f"{requirement}; run make lock"
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pinned is not None
    assert found["torch"] == pinned.group(1)


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_every_locked_package_has_hashes(lock: Path) -> None:
    packages = split(lock.read_text())
    body = "".join(line for line in lock.read_text().splitlines(keepends=True) if not line.startswith("#"))
    assert "".join(packages) == body
    assert all("    --hash=sha256:" in package for package in packages)
    assert all(bool(OF_TORCH.match(package)) == ("torch" in lock.name) for package in packages)


# Dashboards and alerts.


def queries() -> list[tuple[str, str]]:
    """Place and expression, of every panel and every rule."""
    found = []
    for file in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            found += [(f"{file.name}: {panel['title']}", target["expr"]) for target in panel.get("targets", [])]
        found += [(f"{file.name}: {m['name']}", m["expr"]) for m in json.loads(file.read_text())["annotations"]["list"]]
    for file in sorted((DEPLOY / "prometheus").glob("*.yml")):
        for group in yaml.safe_load(file.read_text()).get("groups", []):
            found += [
                (f"{file.name}: {rule.get('alert', rule.get('record'))}", rule["expr"]) for rule in group["rules"]
            ]
    return found


@pytest.mark.parametrize(("place", "query"), queries(), ids=[place for place, _ in queries()])
def test_every_metric_that_is_asked_for_exists(place: str, query: str) -> None:
    metrics = Metrics(REASONS)
    metrics.state.state(State.STARTING.value)
    rules = {place.partition(": ")[2] for place, _ in queries()}
    recorded = re.findall(r"\binstance:[\w:]+", query)
    assert set(recorded) <= rules, place
    query = re.sub(r"\binstance:[\w:]+", "", query)
    families = list(metrics.registry.collect())
    names = {sample.name for family in families for sample in family.samples}
    names |= {family.name + suffix for family in families for suffix in ("", "_total", "_bucket", "_sum", "_count")}
    selectors = re.findall(
        r"\b((?:stream_trainer|process|python)_\w+)(?:\{([^}]*)\})?", re.sub(r"by \([^)]*\)", "", query)
    )
    assert selectors or recorded or query.startswith("up{")
    for name, labels in selectors:
        assert name in names, f"{place} asks for {name}"
        assert re.fullmatch(r"(?:\w+(?:=~?|!=)\"[^\"]*\"(?:, )?)*", labels)


def test_the_overview_answers_what_is_asked_on_call_in_this_order() -> None:
    overview = json.loads((DEPLOY / "grafana" / "dashboards" / "overview.json").read_text())
    rows = [panel["title"] for panel in overview["panels"] if panel["type"] == "row"]
    asked = ("progress", "keeping up", "sane", "fresh", "throw away", "time", "kill", "changed")
    assert [word in row for word, row in zip(asked, rows, strict=True)] == [True] * 8
    assert [row.split()[0] for row in rows] == list("12345678")


@pytest.mark.parametrize("name", ["overview", "selection"])
def test_panels_of_a_dashboard_lie_beside_each_other_and_are_explained(name: str) -> None:
    panels = json.loads((DEPLOY / "grafana" / "dashboards" / f"{name}.json").read_text())["panels"]
    taken = set[tuple[int, int]]()
    for panel in panels:
        at = panel["gridPos"]
        squares = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not squares & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= squares
        assert panel["type"] == "row" or panel["description"].endswith(".")
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_grafana_is_given_what_it_is_told_of() -> None:
    """The dashboards' data source is the one that is provisioned, and their folder the one that is mounted."""
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "dashboards.yml").read_text())["providers"]
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert source["url"] == "http://prometheus:9090"
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]
    for file in (DEPLOY / "grafana" / "dashboards").glob("*.json"):
        uids = set(re.findall(r'"type": "prometheus",\s+"uid": "(\w+)"', file.read_text()))
        assert uids == {source["uid"]}
