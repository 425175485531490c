"""The lighter experts of a token are left out where its heaviest one dominates, here or not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moe_tool.artifacts.routing import Answers, Routing, answers_of
from moe_tool.policies.misses.protocol import keep


@dataclass(frozen=True, slots=True, kw_only=True)
class Prune:
    """MC's online pruning (arXiv:2410.06270) while decoding: slots after the heaviest are left out
    where their gate weight over the heaviest one's is below mu.

    mu is a quantile of the layer's own ratios in the profile: the median in the paper. The gate
    weights of what is kept stay as they are. Where more than two experts are chosen every slot
    after the heaviest is judged alone; the paper has two.
    """

    limit: Mapping[int, float]
    """mu by decoder layer"""
    share: float
    """The quantile that the limits are; for the announcement"""
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
        if routing.phase == "prompt" or limit <= 0:
            return keep(routing)
        is_left_out = ratio_to_heaviest(routing.weight) < limit
        heaviest = routing.weight.argmax(axis=1)
        is_left_out[np.arange(len(heaviest)), heaviest] = False
        if not is_left_out.any():
            return keep(routing)
        return answers_of(
            routing,
            np.where(is_left_out, -1, routing.index),
            np.where(is_left_out, np.float32(0), routing.weight).astype(np.float32),
        )


def ratio_to_heaviest(weight: np.ndarray) -> np.ndarray:
    """Return every slot's gate weight over the token's largest, [T, K] float64.

    Args:
        weight: [T, K] gate weights.
    """
    wide = weight.astype(np.float64)
    largest = wide.max(axis=1, keepdims=True)
    ratio: np.ndarray = np.divide(wide, largest, out=np.zeros_like(wide), where=largest > 0)
    return ratio
