"""Prefetch of every predicted expert that is not resident."""

import numpy as np


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
