"""Similarity measures that rank substitutes (`--by`)."""

from collections.abc import Callable

import numpy as np

from moe_tool.artifacts.buddy_map import Similarity
from moe_tool.artifacts.expert_statistics import ExpertStatistics
from moe_tool.buddies.coactivation import conditional_frequency


def _by_output(statistics: ExpertStatistics) -> np.ndarray:
    """Return 1 - price of the scaled substitute."""
    return 1.0 - statistics.probe.eps_buddy.astype(np.float64)


MEASURES: dict[Similarity, Callable[[ExpertStatistics], np.ndarray]] = {
    "output": _by_output,
    "cka": lambda statistics: statistics.probe.cka.astype(np.float64),
    "cosine": lambda statistics: statistics.probe.cosine.astype(np.float64),
    "coactivation": lambda statistics: conditional_frequency(statistics.in_sample.coactivation),
    "router": lambda statistics: statistics.router_similarity.astype(np.float64),
}
"""Measures by name: each returns [E, E] float64, similarity[i, j] of j as a substitute for i."""
