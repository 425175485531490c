"""The learned estimate of how much each of a token's experts is worth keeping."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np

from moe_tool.artifacts.moe_shape import MoeShape


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerMaskRouter:
    """One layer's router over keep-patterns "the j heaviest experts of the token", j = 1 to K.

    It is linear in what it looks at. Row i belongs to the slot of rank i + 1 by gate weight and
    says what keeping that slot beside the heavier ones adds to the logit of a pattern; the logit of
    "keep one" is 0.
    """

    by_hidden: np.ndarray
    """[K-1, H] float32: of the layer's input at root mean square 1"""
    by_weight: np.ndarray
    """[K-1, 2K] float32: of the logarithms of the gate weights, heaviest first, then of these"""
    by_expert: np.ndarray
    """[K-1, E] float32: of which expert the slot wants"""
    bias: np.ndarray
    """[K-1] float32"""


MaskRouter = Mapping[int, LayerMaskRouter]
"""By decoder layer, every MoE layer of a model"""

MASK_ROUTER_PARTS = tuple(field.name for field in fields(LayerMaskRouter))


def mask_router_shapes(shape: MoeShape) -> dict[str, tuple[int, ...]]:
    """Return the shape of each part of a layer's router, by name."""
    rows = shape.top_k - 1
    return {
        "by_hidden": (rows, shape.hidden),
        "by_weight": (rows, 2 * shape.top_k),
        "by_expert": (rows, shape.experts),
        "bias": (rows,),
    }
