"""Prices of dropping experts, for the manifest."""

import numpy as np

from moe_tool.artifacts.bundle_manifest import LayerPrices
from moe_tool.artifacts.bundle_sections import N_QUANTILES
from moe_tool.artifacts.expert_statistics import ExpertStatistics
from moe_tool.artifacts.router_trace import LayerTrace, mean_squared_gates
from moe_tool.policies.misses.prune import ratio_to_heaviest
from moe_tool.policies.misses.replica import unimportance


def layer_prices(layer: int, statistics: ExpertStatistics, trace: LayerTrace) -> LayerPrices:
    """Return one decoder layer's prices, from the statistics of its experts and its trace."""
    use = mean_squared_gates(trace.top_k_index, trace.top_k_weight, len(statistics.nats))
    weight = trace.top_k_weight.astype(np.float32)
    lighter = np.sort(ratio_to_heaviest(weight), axis=1)[:, :-1]
    return LayerPrices(
        layer=layer,
        nats=tuple(statistics.nats.tolist()),
        use=tuple(use.tolist()),
        unimportance=_quantiles(unimportance(weight)),
        ratio=_quantiles(lighter),
    )


def _quantiles(values: np.ndarray) -> tuple[float, ...]:
    if not values.size:
        return (1.0,) * N_QUANTILES
    found = np.quantile(values, np.linspace(0, 1, N_QUANTILES))
    return tuple(np.clip(found, 0.0, 1.0).tolist())
