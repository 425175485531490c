"""What a miss policy sees of one layer call, and what it says."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

FULL = 0
"""Level of an expert as the bundle holds it; 1, 2, ... are its replicas, the dearest first."""


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
    level: np.ndarray | None = None
    """[T, K'] int64: which form of the expert runs; None: FULL everywhere"""
    lowered: int = 0
    """Slots answered by a replica of the expert that is wanted"""


def answers_of(
    routing: Routing, expert: np.ndarray, weight: np.ndarray, level: np.ndarray | None = None
) -> Answers:
    """Return the answers with what they do counted.

    Args:
        routing: what was asked.
        expert: [T, K'], slot by slot as the routing has them; further slots are extra.
        weight: [T, K'].
        level: [T, K'], None: FULL everywhere.
    """
    wanted = routing.index
    same = expert[:, : wanted.shape[1]]
    is_other = (same >= 0) & (same != wanted)
    lowered = 0
    if level is not None:
        lowered = int(((same == wanted) & (level[:, : wanted.shape[1]] != FULL)).sum())
    return Answers(
        expert=expert,
        weight=weight,
        level=level,
        substituted=int(is_other.sum()),
        dropped=int((same < 0).sum()),
        lowered=lowered,
    )


def answer_exactly(routing: Routing, answers: Answers, rows: np.ndarray) -> Answers:
    """Return the answers with some tokens answered by what they want.

    Args:
        routing: what was asked.
        answers: of a policy.
        rows: [T] bool.
    """
    if not rows.any():
        return answers
    expert, weight = answers.expert.copy(), answers.weight.copy()
    top_k = routing.index.shape[1]
    expert[rows], weight[rows] = -1, 0
    expert[rows, :top_k] = routing.index[rows]
    weight[rows, :top_k] = routing.weight[rows]
    level = answers.level
    if level is not None:
        level = np.where(rows[:, None], FULL, level)
    return answers_of(routing, expert, weight, level)
