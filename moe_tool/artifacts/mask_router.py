"""Learned mask routers, which score how many of a token's experts to run."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np

from moe_tool.artifacts.moe_shape import MoeShape


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerMaskRouter:
    """One layer's linear router over the patterns "keep the j heaviest experts", j = 1 to K.

    Row i gives the logit that keeping the expert of rank i + 1 (by gate weight) adds to keeping
    only the heavier ones; the logit of "keep one" is 0.
    """

    by_hidden: np.ndarray
    """[K-1, H] float32 coefficients of the layer's input, scaled to root mean square 1"""
    by_weight: np.ndarray
    """[K-1, 2K] float32 coefficients of log gate weights, heaviest first, then of gate weights"""
    by_expert: np.ndarray
    """[K-1, E] float32 coefficients of the slot's expert, one-hot"""
    bias: np.ndarray
    """[K-1] float32 constant terms"""


MaskRouter = Mapping[int, LayerMaskRouter]
"""Routers by decoder-layer index, one for every MoE layer"""

MASK_ROUTER_PARTS = tuple(field.name for field in fields(LayerMaskRouter))


def mask_router_shapes(shape: MoeShape) -> dict[str, tuple[int, ...]]:
    """Return the shape of each part of a layer's router, by name."""
    rows = shape.top_k - 1
    return {
        "by_hidden": (rows, shape.expert_hidden),
        "by_weight": (rows, 2 * shape.top_k),
        "by_expert": (rows, shape.experts),
        "bias": (rows,),
    }
