"""Selects training samples, layers and parameters by per-sample gradients, in one pass, in any PyTorch loop.

Tensors in, decisions out: nothing here knows of streams, files or services. Start with `SelectionEngine`. Names follow
the shape suffixes that `capture.factors` explains: `utilities_N` holds a number for each of N candidates.
"""

from gradient_selectors.capture.batch import Batch
from gradient_selectors.capture.capture import GradientCapture
from gradient_selectors.capture.places import UnsupportedParameterError
from gradient_selectors.draw.cluster_ucb import ClusterUcb, StreamOptions
from gradient_selectors.engine import SelectionEngine
from gradient_selectors.mask.dual_sft import DualSft
from gradient_selectors.mask.masked_adamw import MaskedAdamW
from gradient_selectors.mask.rule import MaskRule
from gradient_selectors.offline import select_cluster_ucb, select_dual_sft
from gradient_selectors.route.gast import Gast
from gradient_selectors.views.interaction import Interaction
from gradient_selectors.views.rank_one import RankOne
from gradient_selectors.views.scoring import Exact
from gradient_selectors.views.sketches import Sketched
from gradient_selectors.weigh.baselines import Equal, TopK
from gradient_selectors.weigh.filter_then_weight import FilterThenWeight
from gradient_selectors.weigh.greedy import Greedy
from gradient_selectors.weigh.selector import Decision, Selector

__all__ = [
    "Batch",
    "ClusterUcb",
    "Decision",
    "DualSft",
    "Equal",
    "Exact",
    "FilterThenWeight",
    "Gast",
    "GradientCapture",
    "Greedy",
    "Interaction",
    "MaskRule",
    "MaskedAdamW",
    "RankOne",
    "SelectionEngine",
    "Selector",
    "Sketched",
    "StreamOptions",
    "TopK",
    "UnsupportedParameterError",
    "select_cluster_ucb",
    "select_dual_sft",
]
