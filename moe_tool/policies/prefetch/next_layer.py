"""Every predicted expert that is not in memory."""

import numpy as np


def fetch_predicted(index: np.ndarray, weight: np.ndarray, resident: np.ndarray) -> list[int]:
    """Return the absent experts, those with the largest sum of gate weights first; see
    `ChoosePrefetch`.

    Source: arXiv:2411.01433 section 4.2 looks past the next layer where all that it is predicted to
    want is there, and fetches the unimportant in a lower precision; this stops at the next layer
    and reads whole experts.
    """
    n_experts = len(resident)
    is_expert = (index >= 0) & (index < n_experts)
    experts = index[is_expert]
    total = np.bincount(experts, weights=weight[is_expert], minlength=n_experts)  # [E]
    absent = {int(expert) for expert in experts if not resident[expert]}
    return sorted(absent, key=lambda expert: (-total[expert], expert))
