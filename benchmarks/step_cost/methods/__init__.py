"""The methods that are measured, by name. Each lives in one module, which only its own worker process imports.

A method takes a workload, a device and its arguments from the table; it has `warm_up`, `repetition` and `answers`
(`common.Method`). To measure another one, add a line here.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.step_cost.methods.common import Method
    from benchmarks.step_cost.workloads import Workload

OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "filter_then_weight/exact": ("ours.Ours", {"weigh": "filter_then_weight", "scoring": "exact"}),
    "filter_then_weight/rank_one": ("ours.Ours", {"weigh": "filter_then_weight", "scoring": "rank_one"}),
    "filter_then_weight/sketched": ("ours.Ours", {"weigh": "filter_then_weight", "scoring": "sketched"}),
    "filter_then_weight/sketched+cluster_ucb": (
        "ours.Ours",
        {"weigh": "filter_then_weight", "scoring": "sketched", "draw": "cluster_ucb"},
    ),
    "top_k": ("ours.Ours", {"weigh": "top_k"}),
}
SCORINGS = {name.partition("/")[2]: name for name in OURS if "/" in name}
AGAINST: dict[str, tuple[str, dict[str, Any]]] = {
    "plain_all": ("plain.Plain", {"share": "pool"}),
    "plain_k": ("plain.Plain", {"share": "batch_size"}),
    "oracle": ("per_sample.Oracle", {}),
    "vmap": ("per_sample.Vmap", {}),
    "opacus": ("opacus_peer.Opacus", {}),
    "dattri": ("dattri_peer.Dattri", {}),
}
REFERENCE = "oracle"
UNCHECKED = ("plain_all", "plain_k", REFERENCE)  # they score nothing, or are what the others are compared with
# Peers with an environment of their own (`make bench-env`), and the distribution whose version is reported.
ENVIRONMENTS = {"opacus": ".venv-opacus", "dattri": ".venv-dattri"}
DISTRIBUTIONS = {"opacus": "opacus", "dattri": "dattri-llm"}


def make_method(name: str, workload: "Workload", device: str) -> "Method":
    """The method of that name, ready to warm up. Raises ImportError if its packages are missing."""
    where, arguments = (OURS | AGAINST)[name]
    module, _, attribute = where.partition(".")
    method: Method = getattr(import_module(f"benchmarks.step_cost.methods.{module}"), attribute)(
        workload, device, **arguments
    )
    return method
