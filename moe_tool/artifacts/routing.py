"""One layer call as a miss policy sees it, and the policy's answer."""

from dataclasses import dataclass, replace

import numpy as np

from moe_tool.artifacts.run_stats import PhaseCounters

PRIMARY = 0
"""Row of an expert's primary form; 1, 2, ... are the cheaper forms, the dearest first"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """One MoE layer's routing of T tokens to K of E experts."""

    layer: int
    """Decoder-layer index"""
    index: np.ndarray
    """[T, K] int64: experts wanted, 0 to E - 1; any of them where `present` is False"""
    present: np.ndarray
    """[T, K] bool: False where no stored expert is wanted: an identity expert, or one that was
    removed. Such a slot stays empty under every policy and counts as nothing"""
    weight: np.ndarray
    """[T, K] float32: gate weights; 0 where `present` is False"""
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

    def is_wanted(self, n_experts: int) -> np.ndarray:
        """Return which experts each token wants, [T, E] bool."""
        wanted = np.zeros((len(self.index), n_experts), dtype=bool)
        token, position = np.nonzero(self.present)
        wanted[token, self.index[token, position]] = True
        return wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Experts that compute for each token, in which form and with which weight."""

    expert: np.ndarray
    """[T, K] int64: experts to run, 0 to E - 1; any of them where `present` is False"""
    present: np.ndarray
    """[T, K] bool: False where nothing runs"""
    weight: np.ndarray
    """[T, K] float32: the weight of each, scales included; 0 where nothing runs"""
    form: np.ndarray
    """[T, K] int64: row of the form that runs, PRIMARY where nothing runs"""


def find_present(index: np.ndarray, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return valid experts and which slots name a stored one, see `Routing`.

    Args:
        index: [T, K] as a router named them; E or more is an identity expert.
        stored: [E] bool.
    """
    n_experts = len(stored)
    valid = np.minimum(index, n_experts - 1)
    present: np.ndarray = (index < n_experts) & stored[valid]
    return valid, present


def keep(routing: Routing) -> Answers:
    """Return the answers that change nothing."""
    return Answers(
        expert=routing.index,
        present=routing.present,
        weight=routing.weight,
        form=np.full(routing.index.shape, PRIMARY),
    )


def leave_out(routing: Routing, is_left_out: np.ndarray, form: np.ndarray | None = None) -> Answers:
    """Return the answers with some slots empty and the others as they are.

    Args:
        routing: the layer call.
        is_left_out: [T, K] bool.
        form: [T, K] of the others, None: PRIMARY everywhere.
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
    """Return the answers with some tokens answered by what they want.

    Args:
        routing: the layer call.
        answers: to it, by a policy.
        rows: [T] bool.
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
    """Return counters of the slots that are answered otherwise than wanted, all others 0."""
    is_other = answers.expert != routing.index
    return PhaseCounters(
        substitutions=int((answers.present & is_other).sum()),
        replica_answers=int((answers.present & ~is_other & (answers.form != PRIMARY)).sum()),
        drops=int((routing.present & ~answers.present).sum()),
    )
