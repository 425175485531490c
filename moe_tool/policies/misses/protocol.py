"""What the runtime asks of a miss policy, with what one is made from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moe_tool.artifacts.buddy_map import LayerBuddies
from moe_tool.artifacts.routing import Answers, Routing
from moe_tool.policies.misses.gates import Gates

Reweigh = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(logits [T, E], index [T, K]) -> [T, K]: the gate weights that the model's rule gives a set."""


class MissPolicy(Protocol):
    """Says who answers when an expert is wanted that is not in the fast tier.

    Pure: the same routing and residency give the same answers. Prompts are exact in every policy,
    because what a prompt leaves in the KV cache stays wrong for good. A slot that no policy fills
    keeps the expert that it wanted: the runtime fetches every expert in `Answers.expert` that is
    not resident.
    """

    @property
    def lossy(self) -> bool:
        """Whether the output may differ from the exact one."""

    @property
    def needs_logits(self) -> bool:
        """Whether `Routing.logits` has to be there."""

    @property
    def needs_score(self) -> bool:
        """Whether `Routing.score` has to be there."""

    def describe(self) -> str:
        """Return one line for the announcement before the first token."""

    def decide(self, routing: Routing, resident: np.ndarray) -> Answers:
        """Return who computes what.

        Args:
            routing: one layer call.
            resident: [E] bool.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyInputs:
    """Everything that a policy may be made from; each takes what it needs."""

    gates: Gates | None = None
    """None: nothing is known of the thresholds, and no gated policy can be built"""
    buddies: tuple[LayerBuddies, ...] | None = None
    logit_weight: float = 0.0
    """BuddyMoE's eta: how much this token's own router logits move its choice among the buddies"""
    reweigh: Mapping[int, Reweigh] | None = None
    """By decoder layer; None where the model's weight rule is not known"""
    seed: int = 0


def keep(routing: Routing) -> Answers:
    """Return the answers that change nothing."""
    return Answers(expert=routing.index, weight=routing.weight, substituted=0, dropped=0)
