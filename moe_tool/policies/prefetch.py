"""Prefetch policies: the choice of experts to read before their layer is called."""

from collections.abc import Callable

import numpy as np

ChoosePrefetch = Callable[[np.ndarray, np.ndarray, np.ndarray], list[int]]
"""Pure function (predicted experts [T, K] int64, their gate weights [T, K], experts in memory or
being read [E] bool) -> experts of the next MoE layer to read, the most wanted first; ids outside
0..E-1 mean no expert"""


def fetch_predicted(index: np.ndarray, weight: np.ndarray, resident: np.ndarray) -> list[int]:
    """Return the missing experts by falling sum of gate weights; see `ChoosePrefetch`.

    Source: arXiv:2411.01433, section 4.2, which also looks past the next layer if all its predicted
    experts are resident, and fetches unimportant experts in a lower precision.
    """
    n_experts = len(resident)
    is_expert = (index >= 0) & (index < n_experts)
    experts = index[is_expert]
    total = np.bincount(experts, weights=weight[is_expert], minlength=n_experts)  # [E]
    missing = {int(expert) for expert in experts if not resident[expert]}
    return sorted(missing, key=lambda expert: (-total[expert], expert))


PREFETCH: dict[str, ChoosePrefetch | None] = {"none": None, "next-layer": fetch_predicted}
"""Every way to choose by the name that `--prefetch` takes; None reads nothing before it is wanted.

All of them are given what the next MoE layer's router says of this layer's hidden states.
"""
