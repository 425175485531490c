"""Interface and inputs of miss policies."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from moe_tool.artifacts.buddy_map import LayerBuddies, Similarity
from moe_tool.artifacts.bundle_sections import LearnedPruning
from moe_tool.artifacts.routing import Answers, Routing
from moe_tool.policies.misses.gates import Gates
from moe_tool.policies.misses.price_book import PriceBook

Reweigh = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Function (logits [T, E], index [T, K], present [T, K] bool) -> [T, K] float32: gate weights of a
set of experts by the model's rule; a slot that is not present weighs 0"""
RouterNeed = Literal["nothing", "logits", "scores"]


class MissPolicy(Protocol):
    """Policy that decides what answers wanted experts, above all missing ones.

    It is pure: the same routing and residency give the same answers. A slot that is not changed
    keeps its wanted expert, which the runtime fetches if it is not resident. A slot that is not
    present in the routing is not present in the answers either.
    """

    needs_router: RouterNeed = "nothing"
    """Whether `Routing.logits`, or these and `Routing.score`, are required"""
    chooses_prefetches: bool = False
    """Whether a prefetch reads the forms that the policy would answer the predicted routing with;
    otherwise it reads every predicted expert in full"""
    target_kl: float = math.inf
    """Nats per token at which the run's worth of a read keeps the expected loss; infinite if the
    policy has a worth of its own, or none"""
    nats_per_mb: float = math.inf
    """Worth of avoiding a read of 10^6 bytes that such a run begins with, nats"""
    needs_costs: bool = False
    """Whether `Routing.costs_ms` is wanted, so that answers depend on timing"""

    def describe(self) -> str:
        """Return one line for the announcement before the first token."""

    def decide(self, routing: Routing, resident: np.ndarray) -> Answers:
        """Return the answers to a layer call; `resident` [F, E] bool says which forms of which
        experts are in memory, in row PRIMARY the primary ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyInputs:
    """Data that policies may be made from."""

    gates: Gates | None = None
    """Gates with their thresholds; None if these are unknown"""
    buddies: tuple[LayerBuddies, ...] | None = None
    buddies_by: Similarity | None = None
    """Measure that ranks the buddies; None if it is unknown"""
    hops: np.ndarray | None = None
    """[E] hops to the device that holds each expert; None: all are on one device, 0"""
    reweigh: Mapping[int, Reweigh] | None = None
    """Decoder layer -> gate weight rule; None if it is unknown"""
    scores_are_logits: bool = True
    """Whether the routers choose by their logits; otherwise by probabilities, with or without a
    bias"""
    prices: PriceBook | None = None
    """Prices of answers; None if the bundle was packed without a profile"""
    unimportance: Mapping[int, np.ndarray] = field(default_factory=dict)
    """Decoder layer -> quantiles of `replica.unimportance` in the profile"""
    ratios: Mapping[int, np.ndarray] = field(default_factory=dict)
    """Decoder layer -> quantiles of `prune.ratio_to_heaviest` of the slots after the heaviest"""
    pruning: LearnedPruning | None = None
    """Description of the bundle's trained mask routers; None without any"""
    top_k: int = 2
    """K"""
    forms: tuple[str, ...] = ("native",)
    """Name of each form, the primary one first"""
    stored: Mapping[int, np.ndarray] = field(default_factory=dict)
    """Decoder layer -> [F, E] bool: forms in the bundle; empty if every expert has every form"""
    seed: int = 0


def read_quantile(table: np.ndarray, share: float) -> float:
    """Return the quantile at a share from 0 to 1, from those at equally spaced shares."""
    return float(np.interp(share, np.linspace(0, 1, len(table)), table))
