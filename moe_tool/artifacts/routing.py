"""What a miss policy sees of one layer call, and what it says."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

ABSENT = 0
"""Level of an expert that is not in the fast tier."""
RESIDENT = 1
"""Level of an expert that is there at the bundle's precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """One MoE layer's routing of T tokens."""

    layer: int
    """Decoder-layer index"""
    index: np.ndarray
    """[T, K] int64: experts wanted"""
    weight: np.ndarray
    """[T, K] float32: their gate weights"""
    score: np.ndarray | None
    """[T, E] float16: the router's selection scores, None where no policy asked for them"""
    logits: np.ndarray | None
    """[T, E] float16: the router's raw logits, None where no policy asked for them"""
    phase: Literal["prompt", "decode"]
    sequence: np.ndarray
    """[T] int64: which sequence of the batch a token belongs to"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Who computes what: for each token the experts to run, and with which weight."""

    expert: np.ndarray
    """[T, K'] int64: experts to run; -1 where a slot stays empty (dropped)"""
    weight: np.ndarray
    """[T, K'] float32: the weight of each, scales included; 0 where the slot is empty"""
    substituted: int
    """Slots answered by another expert than the one wanted"""
    dropped: int
    """Slots answered by nothing"""
