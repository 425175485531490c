"""Prefetch policies: the choice of experts to read before their layer is called."""

from collections.abc import Callable

import numpy as np

from moe_tool.policies.prefetch.next_layer import fetch_predicted

ChoosePrefetch = Callable[[np.ndarray, np.ndarray, np.ndarray], list[int]]
"""Pure function (predicted experts [T, K] int64, their gate weights [T, K], experts in memory or
being read [E] bool) -> experts of the next MoE layer to read, the most wanted first; ids outside
0..E-1 mean no expert"""
PREFETCH: dict[str, ChoosePrefetch | None] = {"none": None, "next-layer": fetch_predicted}
"""Every way to choose by the name that `--prefetch` takes; None reads nothing before it is wanted.

All of them are given what the next MoE layer's router says of this layer's hidden states.
"""

__all__ = ["PREFETCH", "ChoosePrefetch", "fetch_predicted"]
