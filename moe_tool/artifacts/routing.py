"""What a miss policy sees of one layer call, and what it says."""

from dataclasses import dataclass

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
    sequence: np.ndarray
    """[T] int64: which sequence of the batch a token belongs to"""
    importance: np.ndarray | None = None
    """[T] float32: of a prompt's tokens, where a policy asked for it; None while decoding"""
    worth: np.ndarray | None = None
    """[T, K-1] float32: what a trained router says that the slots after the heaviest are worth, by
    rank of gate weight; None where no policy asked for it"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Who computes what: for each token the experts to run, and with which weight."""

    expert: np.ndarray
    """[T, K] int64: experts to run; -1 where a slot stays empty (dropped)"""
    weight: np.ndarray
    """[T, K] float32: the weight of each, scales included; 0 where the slot is empty"""
    substituted: int
    """Slots answered by another expert than the one wanted"""
    dropped: int
    """Slots answered by nothing"""
    level: np.ndarray | None = None
    """[T, K] int64: which form of the expert runs; None: FULL everywhere"""
    lowered: int = 0
    """Slots answered by a replica of the expert that is wanted"""


def answers_of(
    routing: Routing, expert: np.ndarray, weight: np.ndarray, level: np.ndarray | None = None
) -> Answers:
    """Return the answers with what they do counted.

    Args:
        routing: what was asked.
        expert: [T, K], slot by slot as the routing has them.
        weight: [T, K].
        level: [T, K], None: FULL everywhere.
    """
    is_same = expert == routing.index
    return Answers(
        expert=expert,
        weight=weight,
        level=level,
        substituted=int(((expert >= 0) & ~is_same).sum()),
        dropped=int((expert < 0).sum()),
        lowered=0 if level is None else int((is_same & (level != FULL)).sum()),
    )


def leave_out(
    routing: Routing, is_left_out: np.ndarray, level: np.ndarray | None = None
) -> Answers:
    """Return the answers with some slots empty and the others as they are.

    Args:
        routing: what was asked.
        is_left_out: [T, K] bool.
        level: [T, K] of the others, None: FULL everywhere.
    """
    return answers_of(
        routing,
        np.where(is_left_out, -1, routing.index),
        np.where(is_left_out, np.float32(0), routing.weight).astype(np.float32),
        level,
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
    exact = rows[:, None]
    return answers_of(
        routing,
        np.where(exact, routing.index, answers.expert),
        np.where(exact, routing.weight, answers.weight),
        None if answers.level is None else np.where(exact, FULL, answers.level),
    )
