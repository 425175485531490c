"""Routing of one layer call as input of a miss policy, and the policy's answers."""

from dataclasses import dataclass, replace

import numpy as np

from moe_tool.artifacts.run_stats import PhaseCounters

PRIMARY = 0
"""Row of an expert's primary form; 1, 2, ... are cheaper forms by descending cost"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """One MoE layer's routing of T tokens to K of E experts."""

    layer: int
    """Decoder-layer index"""
    index: np.ndarray
    """[T, K] int64: wanted experts, 0 to E - 1; arbitrary where `present` is False"""
    present: np.ndarray
    """[T, K] bool: False for identity and removed experts. Such a slot stays empty under every
    policy and is not counted"""
    weight: np.ndarray
    """[T, K] float32: gate weights; 0 where `present` is False"""
    score: np.ndarray | None
    """[T, E] float16: the router's selection scores; None unless the policy needs them"""
    logits: np.ndarray | None
    """[T, E] float16: the router's raw logits; None unless the policy needs them"""
    sequence: np.ndarray
    """[T] int64: each token's sequence in the batch"""
    importance: np.ndarray | None = None
    """[T] float32: importance of a prompt's tokens; None while decoding or if not needed"""
    worth: np.ndarray | None = None
    """[T, K-1] float32: mask-router scores of the slots after the heaviest, by descending gate
    weight; None unless the policy needs them"""
    costs_ms: tuple[float, float] | None = None
    """Mean milliseconds of a read and of a cheaper form's product so far; None before there are
    any, or unless the policy needs them"""
    nats_per_mb: float | None = None
    """Worth of avoiding a read of 10^6 bytes at this token; None: as the policy has it"""
    factors: np.ndarray | None = None
    """[1 + F] float64: factor on the price of each class of answers, see `PriceBook.by_class`, as
    measured on this text; None: 1"""

    def is_wanted(self, n_experts: int) -> np.ndarray:
        """Return the mask of each token's wanted experts, [T, E] bool."""
        wanted = np.zeros((len(self.index), n_experts), dtype=bool)
        token, position = np.nonzero(self.present)
        wanted[token, self.index[token, position]] = True
        return wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Experts that compute for each token, in which form and with which weight."""

    expert: np.ndarray
    """[T, K] int64: experts to run, 0 to E - 1; arbitrary where `present` is False"""
    present: np.ndarray
    """[T, K] bool: False where nothing runs"""
    weight: np.ndarray
    """[T, K] float32: weight of each expert's output, scale included; 0 where nothing runs"""
    form: np.ndarray
    """[T, K] int64: row of the form that runs, PRIMARY where nothing runs"""


def keep(routing: Routing) -> Answers:
    """Return the exact answers: every slot its wanted expert."""
    return Answers(
        expert=routing.index,
        present=routing.present,
        weight=routing.weight,
        form=np.full(routing.index.shape, PRIMARY),
    )


def leave_out(routing: Routing, is_left_out: np.ndarray, form: np.ndarray | None = None) -> Answers:
    """Return the wanted experts with some slots dropped.

    Args:
        is_left_out: [T, K] bool.
        form: [T, K] forms of the other slots; None: PRIMARY everywhere.
    """
    present = routing.present & ~is_left_out
    kept = keep(routing)
    return replace(
        kept,
        present=present,
        weight=np.where(present, routing.weight, np.float32(0)).astype(np.float32),
        form=kept.form if form is None else np.where(present, form, PRIMARY),
    )


def answer_exactly(routing: Routing, answers: Answers, rows: np.ndarray) -> Answers:
    """Return the answers with some tokens answered exactly.

    Args:
        rows: [T] bool, the tokens to answer exactly.
    """
    if not rows.any():
        return answers
    exact = rows[:, None]
    return Answers(
        expert=np.where(exact, routing.index, answers.expert),
        present=np.where(exact, routing.present, answers.present),
        weight=np.where(exact, routing.weight, answers.weight),
        form=np.where(exact, PRIMARY, answers.form),
    )


def count_answers(routing: Routing, answers: Answers) -> PhaseCounters:
    """Return the counters of substitutions, replica answers and drops, all others 0."""
    is_other = answers.expert != routing.index
    return PhaseCounters(
        substitutions=int((answers.present & is_other).sum()),
        replica_answers=int((answers.present & ~is_other & (answers.form != PRIMARY)).sum()),
        drops=int((routing.present & ~answers.present).sum()),
    )
