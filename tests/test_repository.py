"""Rules of the repository that no other tool enforces."""

import ast
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SERVICE_ROOT, LIBRARY_ROOT = ROOT / "stream_trainer", ROOT / "selectors" / "gradient_selectors"
SERVICE, LIBRARY = sorted(SERVICE_ROOT.rglob("*.py")), sorted(LIBRARY_ROOT.rglob("*.py"))
EVERYTHING = [
    path
    for folder in ("stream_trainer", "selectors", "tests", "benchmarks", "examples", "docs")
    for path in sorted((ROOT / folder).rglob("*.py"))
]

# Each room, from the bottom up, and the rooms that it may import. A file at the top level is a room of its own.
LIBRARY_ROOMS = {
    "state": (),
    "examples": (),
    "preconditioner": (),
    "capture": ("preconditioner",),
    "world": (),
    "target": ("world", "capture"),
    "views": ("world", "capture", "preconditioner"),
    "sharding": ("world", "capture"),
    "features": (),
    "draw": ("features",),
    "weigh": ("draw", "views", "world", "capture", "preconditioner", "state"),
    "route": ("weigh", "views"),
    "mask": ("target", "world", "capture", "preconditioner"),
    "engine": ("mask", "route", "weigh", "views", "target", "world", "capture", "preconditioner", "state"),
    "offline": ("mask", "draw", "features", "target", "capture", "preconditioner"),
    "integrations": ("engine", "mask", "route", "weigh", "views", "target", "state"),
    "__init__": ("engine", "offline", "mask", "route", "weigh", "draw", "views", "capture"),
}
SERVICE_ROOMS = {
    "__init__": (),
    "errors": (),
    "records": (),
    "formats": ("errors",),
    "settings": ("errors",),
    "sources": ("settings", "formats", "records", "errors"),
    "samples": ("settings", "formats", "records", "errors"),
    "models": ("samples", "settings", "errors"),
    "checkpoints": ("models", "settings", "formats", "records", "errors"),
    "ledger": ("checkpoints", "settings", "records", "errors"),
    "monitoring": ("settings", "records", "errors"),
    "ingest": (
        *("monitoring", "checkpoints", "samples", "sources"),
        *("settings", "records", "errors", "__init__"),
    ),
    "training": (
        *("ingest", "monitoring", "checkpoints", "models", "samples"),
        *("settings", "records", "errors", "__init__"),
    ),
    "distributed": ("training", "ingest", "monitoring", "checkpoints", "models", "settings", "records", "errors"),
    "publishing": ("training", "monitoring", "checkpoints", "models", "settings", "errors", "__init__"),
    "tracking": ("training", "monitoring", "models", "settings", "__init__"),
    "commands": (
        *("publishing", "training", "ingest", "monitoring", "ledger", "checkpoints", "models", "samples", "sources"),
        *("settings", "formats", "records", "errors"),
    ),
    "assembly": (
        *("tracking", "publishing", "distributed", "training", "ingest", "monitoring", "ledger", "checkpoints"),
        *("models", "samples", "sources", "settings", "records", "__init__"),
    ),
    "service": ("assembly", "distributed", "training", "monitoring", "checkpoints", "samples", "settings", "__init__"),
    "replay": ("service", "training", "checkpoints", "settings", "records", "errors"),
    "demo": (
        *("service", "commands", "training", "monitoring"),
        *("settings", "records", "errors"),
    ),
    "cli": ("demo", "replay", "service", "commands", "monitoring", "settings", "errors", "__init__"),
    "__main__": ("cli", "distributed"),
}

KAFKA = {
    "stream_trainer/commands/produce.py",
    "stream_trainer/commands/publish.py",
    "stream_trainer/ingest/letter_sender.py",
    "stream_trainer/ingest/letter_topic.py",
    "stream_trainer/sources/batches.py",
    "stream_trainer/sources/beginning.py",
    "stream_trainer/sources/compacted/topic.py",
    "stream_trainer/sources/connection.py",
    "stream_trainer/sources/group.py",
    "stream_trainer/sources/kafka.py",
    "stream_trainer/sources/security.py",
    "stream_trainer/sources/topic_log.py",
}

MAX_SIDE_BY_SIDE, MAX_LINES, MAX_FUNCTION, P90_FUNCTION = 14, 400, 60, 25


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imported(path: Path) -> frozenset[str]:
    """Dotted names of what a module imports, wherever the import stands; not what only type checkers read."""
    skipped = {
        id(node)
        for branch in ast.walk(tree(path))
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def importers(package: str, paths: list[Path]) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in paths
        if any(name == package or name.startswith(f"{package}.") for name in imported(path))
    }


def room_of(path: Path, root: Path) -> str:
    return path.relative_to(root).parts[0].removesuffix(".py")


def room_imports(root: Path) -> dict[str, set[str]]:
    """Which other rooms of its package each room imports."""
    package, arrows = root.name, defaultdict[str, set[str]](set)
    for path in sorted(root.rglob("*.py")):
        room = room_of(path, root)
        arrows[room] |= set()
        for name in imported(path):
            first, _, rest = name.partition(".")
            if first != package:
                continue
            other = rest.partition(".")[0]
            is_room = (root / other).is_dir() or (root / f"{other}.py").is_file()
            arrows[room].add(other if is_room else "__init__")
        arrows[room].discard(room)
    return arrows


def lengths_of_functions(paths: list[Path]) -> list[int]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for path in paths for node in ast.walk(tree(path)) if isinstance(node, kinds)]
    return [(node.end_lineno or 0) - node.lineno + 1 for node in nodes]


@pytest.mark.parametrize("module", ["selectors", "asyncio", "subprocess"])
def test_the_folder_selectors_does_not_shadow_the_standard_module(module: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = f"import {module}, selectors; print(selectors.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert not Path(found.stdout.strip()).is_relative_to(ROOT)
    assert not (ROOT / "selectors" / "__init__.py").exists()


@pytest.mark.parametrize(("root", "rooms"), [(LIBRARY_ROOT, LIBRARY_ROOMS), (SERVICE_ROOT, SERVICE_ROOMS)])
def test_a_room_imports_only_rooms_below_it(root: Path, rooms: Mapping[str, tuple[str, ...]]) -> None:
    arrows, order = room_imports(root), list(rooms)
    print(f"\n{root.name}, from the bottom up:")
    for room in order:
        print(f"  {room:<15} imports {', '.join(sorted(arrows[room], key=order.index)) or 'nothing'}")
    assert arrows.keys() == rooms.keys(), "the table has a row for each room"
    for room, others in arrows.items():
        assert others == set(rooms[room]), f"{room} imports {sorted(others)}; the table says {sorted(rooms[room])}"
        assert all(order.index(other) < order.index(room) for other in others), f"{room} imports a room above it"


def test_modules_import_one_another_in_no_circle() -> None:
    modules = {
        path: ".".join(path.relative_to(root.parent).with_suffix("").parts)
        for root, paths in ((SERVICE_ROOT, SERVICE), (LIBRARY_ROOT, LIBRARY))
        for path in paths
    }
    names = set(modules.values())
    arrows: dict[str, set[str]] = {}
    for path, name in modules.items():
        if path.name == "__init__.py":
            continue
        wanted = {other for target in imported(path) for other in names if other in (target, target.rpartition(".")[0])}
        arrows[name] = wanted - {name}
    done: set[str] = set()
    while ready := {name for name, others in arrows.items() if name not in done and others & arrows.keys() <= done}:
        done |= ready
    assert not arrows.keys() - done, "these import one another"


def test_no_folder_of_code_holds_many_modules_side_by_side() -> None:
    folders = defaultdict[Path, list[str]](list)
    for path in EVERYTHING:
        if path.name != "__init__.py":
            folders[path.parent].append(path.name)
    crowded = {str(folder.relative_to(ROOT)): len(names) for folder, names in folders.items()}
    assert not {folder: count for folder, count in crowded.items() if count > MAX_SIDE_BY_SIDE}


def test_the_packages_export_exactly_what_they_say() -> None:
    code = (
        "import gradient_selectors, stream_trainer\n"
        "for module in (gradient_selectors, stream_trainer):\n"
        "    print(*sorted(name for name in module.__all__ if getattr(module, name) is not None))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    library, service = found.stdout.splitlines()
    assert 15 <= len(library.split()) <= 30
    assert service.split() == ["Settings", "StepReport", "StreamTrainerError", "serve"]


def test_only_the_modules_that_talk_to_brokers_import_kafka() -> None:
    assert importers("kafka", SERVICE + LIBRARY) <= KAFKA


def test_only_the_interior_point_imports_cvxpy() -> None:
    assert importers("cvxpy", SERVICE + LIBRARY) <= {"selectors/gradient_selectors/weigh/interior_point.py"}


def test_only_metrics_makes_metrics() -> None:
    made = {"Counter", "Gauge", "Histogram", "Summary", "Info", "Enum"}
    makers = {
        path.name for path in SERVICE + LIBRARY if {f"prometheus_client.{name}" for name in made} & imported(path)
    }
    assert makers == {"metrics.py"}


def test_the_library_knows_nothing_of_the_service() -> None:
    assert importers("stream_trainer", LIBRARY) == set()
    for package in ("kafka", "prometheus_client", "pydantic", "http"):
        assert importers(package, LIBRARY) == set()


def test_the_service_asks_no_optimizer_what_kind_it_is() -> None:
    asked = {
        path.name
        for path in SERVICE
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance" and "AdamW" in ast.unparse(node)
    }
    assert asked == set()


def test_nothing_is_named_by_identity() -> None:
    """Other libraries put other objects where a parameter was: what is looked up by `id` is then lost in silence."""
    for path in SERVICE + LIBRARY:
        called = {ast.unparse(node.func) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)}
        assert "id" not in called, path


def test_nothing_is_pickled() -> None:
    for package in ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"):
        assert importers(package, SERVICE + LIBRARY) == set()
    for path in SERVICE + LIBRARY:
        called = {ast.unparse(node.func) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)}
        assert not called & {"torch.load", "torch.save", "pd.read_pickle"}, path


@pytest.mark.parametrize("path", SERVICE + LIBRARY, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_modules_are_short_and_say_what_they_are(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES
    assert ast.get_docstring(tree(path))
    assert max(lengths_of_functions([path]), default=0) <= MAX_FUNCTION


@pytest.mark.parametrize("paths", [SERVICE, LIBRARY], ids=["service", "library"])
def test_most_functions_are_short(paths: list[Path]) -> None:
    assert statistics.quantiles(lengths_of_functions(paths), n=10)[-1] < P90_FUNCTION


def test_every_result_has_a_reader() -> None:
    """Whatever a benchmark has left in `results/` is in the page that is made from it."""
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    for path in sorted((ROOT / "benchmarks" / "results").iterdir()):
        assert path.name in page, f"{path.name} is shown nowhere: delete it, it stays in the history"


def test_subjects_of_releases_are_versions_of_the_changelog() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    versions = [line.split("[")[1].split("]")[0] for line in lines if line.startswith("## [")]
    assert versions[0] == "Unreleased" or versions[0][0].isdigit()
    released = [tuple(map(int, version.split("."))) for version in versions if version[0].isdigit()]
    assert all(later > earlier for later, earlier in pairwise(released))
    assert "0.1.0" in versions


def test_help_does_not_wait_for_heavy_modules() -> None:
    code = "import sys, stream_trainer.cli; print({'torch', 'transformers', 'kafka', 'pydantic'} & set(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.strip() == "set()"
