"""Prefetch policies: the choice of experts to read before their layer is called."""

from moe_tool.policies.prefetch.answered import answer_prediction
from moe_tool.policies.prefetch.choice import NO_PREFETCH, PREFETCH, PrefetchChoice, parse_prefetch
from moe_tool.policies.prefetch.protocol import LayerPrefetch, Prediction, Predictor
from moe_tool.policies.prefetch.stacked import choose_prefetches, fetch_predicted
from moe_tool.policies.prefetch.top_scores import keep_top_scores

__all__ = [
    "NO_PREFETCH",
    "PREFETCH",
    "LayerPrefetch",
    "Prediction",
    "Predictor",
    "PrefetchChoice",
    "answer_prediction",
    "choose_prefetches",
    "fetch_predicted",
    "keep_top_scores",
    "parse_prefetch",
]
