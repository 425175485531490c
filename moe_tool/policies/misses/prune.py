"""The lighter experts of a token are left out where its heaviest one dominates, here or not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moe_tool.artifacts.routing import Answers, Routing, keep, leave_out


@dataclass(frozen=True, slots=True, kw_only=True)
class Prune:
    """MC's online pruning (arXiv:2410.06270): slots after the heaviest are left out where their
    gate weight over the heaviest one's is below mu. Of a prompt, where it is answered lossily, the
    tokens that matter most are spared; while decoding none is, as in the paper.

    mu is a quantile of the layer's own ratios in the profile: the median in the paper. The gate
    weights of what is kept stay as they are. Where more than two experts are chosen every slot
    after the heaviest is judged alone; the paper has two.
    """

    limit: Mapping[int, float]
    """mu by decoder layer"""
    share: float
    """The quantile that the limits are; for the announcement"""
    protect: float
    """Share of a sequence's prompt tokens in a forward that are spared"""
    lossy: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = False
    needs_score: ClassVar[bool] = False

    def describe(self) -> str:
        """Return one line for the announcement."""
        return (
            f"prune: the lightest {self.share:.0%} of the experts after a token's heaviest are "
            "left out, text may differ"
        )

    def decide(self, routing: Routing, resident: np.ndarray) -> Answers:
        """Return the routing with light slots empty."""
        limit = self.limit[routing.layer]
        if limit <= 0:
            return keep(routing)
        is_left_out = ratio_to_heaviest(routing.weight) < limit
        heaviest = routing.weight.argmax(axis=1)
        is_left_out[np.arange(len(heaviest)), heaviest] = False
        if routing.importance is not None:
            spared = most_important(routing.importance, routing.sequence, self.protect)
            is_left_out[spared] = False
        if not is_left_out.any():
            return keep(routing)
        return leave_out(routing, is_left_out)


def most_important(importance: np.ndarray, sequence: np.ndarray, share: float) -> np.ndarray:
    """Return which tokens are among the share of their sequence that matters most, [T] bool; the
    earlier one of equals.

    Args:
        importance: [T], see `token_importance`.
        sequence: [T], which one a token belongs to.
        share: of each sequence's tokens, rounded up.
    """
    found = np.zeros(len(importance), dtype=bool)
    for each in np.unique(sequence):
        own = np.flatnonzero(sequence == each)
        count = int(np.ceil(share * len(own)))
        found[own[np.argsort(-importance[own], kind="stable")[:count]]] = True
    return found


def token_importance(hidden: np.ndarray, received: np.ndarray) -> np.ndarray:
    """Return how much a prompt's tokens matter, [T] float32: the size of a token times the
    attention that it receives.

    Args:
        hidden: [T, H]: what the layer's experts are given.
        received: [T], see models/attention_sums.
    """
    importance: np.ndarray = np.abs(hidden).sum(axis=1) * received
    return importance.astype(np.float32)


def ratio_to_heaviest(weight: np.ndarray) -> np.ndarray:
    """Return every slot's gate weight over the token's largest, [T, K] float64.

    Args:
        weight: [T, K] gate weights.
    """
    wide = weight.astype(np.float64)
    largest = wide.max(axis=1, keepdims=True)
    ratio: np.ndarray = np.divide(wide, largest, out=np.zeros_like(wide), where=largest > 0)
    return ratio
