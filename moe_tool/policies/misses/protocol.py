"""Interface of a miss policy, and the inputs that one is made from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from moe_tool.artifacts.buddy_map import LayerBuddies
from moe_tool.artifacts.bundle_sections import LearnedPruning
from moe_tool.artifacts.routing import Answers, Routing
from moe_tool.policies.misses.gates import Gates
from moe_tool.policies.misses.price_book import PriceBook

Reweigh = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(logits [T, E], index [T, K], present [T, K] bool) -> [T, K] float32: the gate weights that the
model's rule gives a set of experts; a slot that is not present is no part of it and weighs 0."""


class MissPolicy(Protocol):
    """Says who answers when an expert is wanted that is not in the fast tier.

    Pure: the same routing and residency give the same answers. A slot that no policy fills keeps
    the expert that it wanted: the runtime fetches every expert of a present slot that is not
    resident. A slot that is not present in the routing is not present in the answers either.
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
            resident: [F, E] bool: which forms of which experts are in memory; row PRIMARY is the
                experts' primary forms.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyInputs:
    """Everything that a policy may be made from; each takes what it needs."""

    gates: Gates | None = None
    """Thresholds; None where they are not known, and then no gated policy can be built"""
    buddies: tuple[LayerBuddies, ...] | None = None
    reweigh: Mapping[int, Reweigh] | None = None
    """Decoder layer -> gate weight rule; None where it is not known"""
    scores_are_logits: bool = True
    """Whether the routers choose by their logits; otherwise by probabilities, with or without a
    bias"""
    prices: PriceBook | None = None
    """Prices of answers; None where the bundle was packed without a profile"""
    unimportance: Mapping[int, np.ndarray] = field(default_factory=dict)
    """Decoder layer -> quantiles of `replica.unimportance` in the profile"""
    ratios: Mapping[int, np.ndarray] = field(default_factory=dict)
    """Decoder layer -> quantiles of `prune.ratio_to_heaviest` of the slots after the heaviest"""
    pruning: LearnedPruning | None = None
    """Description of the bundle's trained mask routers; None where there are none"""
    top_k: int = 2
    """K"""
    forms: tuple[str, ...] = ("native",)
    """Name of each form, the primary one first"""
    stored: Mapping[int, np.ndarray] = field(default_factory=dict)
    """Decoder layer -> [F, E] bool: forms in the bundle; empty where it has every form of every
    expert"""
    seed: int = 0


def as_shares(score: np.ndarray, *, are_logits: bool) -> np.ndarray:
    """Return selection scores that can be compared as ratios and added up, [T, E] float64.

    Args:
        score: [T, E]; an expert outside a token's groups is below all others, or -inf.
        are_logits: whether their softmax is meant; otherwise they are probabilities, to which a
            bias may have been added: what that leaves below 0 is 0.
    """
    wide = score.astype(np.float64)
    if not are_logits:
        return np.maximum(np.where(np.isfinite(wide), wide, 0.0), 0.0)
    raised = np.exp(wide - wide.max(axis=1, keepdims=True))
    result: np.ndarray = raised / raised.sum(axis=1, keepdims=True)
    return result
