"""Order of expert records in a bundle: by layer, the hottest first, followed by co-used ones."""

import numpy as np


def order_experts(load: np.ndarray, coactivation: np.ndarray) -> list[int]:
    """Return one layer's experts in the order in which their records should lie.

    Starts at the hottest expert and continues greedily with the one most often used together with
    the last, so that a token's experts lie close together. Ties go to the hotter, then to the lower
    id.

    Args:
        load: [E] tokens routed to each expert.
        coactivation: [E, E] tokens whose top-k holds both; the diagonal is ignored.
    """
    n_experts = len(load)
    order = [int(np.lexsort((np.arange(n_experts), -load))[0])]
    left = [expert_id for expert_id in range(n_experts) if expert_id != order[0]]
    while left:
        last = order[-1]
        best = max(left, key=lambda e: (int(coactivation[last, e]), int(load[e]), -e))
        order.append(best)
        left.remove(best)
    return order
