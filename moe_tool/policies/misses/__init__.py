"""Answers to a miss: a wanted expert that is not in the fast tier."""

from moe_tool.policies.misses.choice import (
    EXACT_POLICY,
    PRICED_POLICY,
    MissChoice,
    parse_miss_policy,
)
from moe_tool.policies.misses.gates import Gates
from moe_tool.policies.misses.price_book import LayerBook, PriceBook
from moe_tool.policies.misses.protocol import MissPolicy, PolicyInputs, Reweigh
from moe_tool.policies.misses.registry import MISS_POLICIES
from moe_tool.policies.misses.spec import PolicySpec
from moe_tool.policies.misses.strength import StrengthGrid

__all__ = [
    "EXACT_POLICY",
    "MISS_POLICIES",
    "PRICED_POLICY",
    "Gates",
    "LayerBook",
    "MissChoice",
    "MissPolicy",
    "PolicyInputs",
    "PolicySpec",
    "PriceBook",
    "Reweigh",
    "StrengthGrid",
    "parse_miss_policy",
]
