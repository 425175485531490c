"""Perplexity that fewer bits are predicted to add, from a profile's prices."""

import math

import numpy as np

from moe_tool.artifacts.expert_statistics import PRICED_WIDTHS, ExpertStatistics
from moe_tool.artifacts.pack_plan import Bits


def predicted_loss(statistics: dict[int, ExpertStatistics], bits: Bits) -> float:
    """Return the share that perplexity is predicted to grow by if all experts have these bits.

    A layer's output error is taken as its experts' mean squared relative error, weighted by their
    use; times the layer's sensitivity it is KL in nats, and layers add up. Errors of experts that
    are computed together cancel in part, so that this is an upper estimate.

    Args:
        statistics: by decoder layer.
        bits: of every expert.
    """
    if bits == "native":
        return 0.0
    column = PRICED_WIDTHS.index(int(bits))
    divergence = 0.0
    for each in statistics.values():
        load = each.in_sample.load.astype(np.float64)
        squared = each.eps_bits[:, column].astype(np.float64) ** 2
        mean = float((load * squared).sum() / load.sum()) if load.any() else float(squared.mean())
        divergence += each.sensitivity * mean
    return math.expm1(min(divergence, 20.0))
