"""Who answers when a wanted expert is not in the fast tier."""

from moe_tool.policies.misses.choice import MISS_POLICIES, MissChoice, parse_miss_policy
from moe_tool.policies.misses.gates import Gates
from moe_tool.policies.misses.price_book import LayerBook, PriceBook
from moe_tool.policies.misses.protocol import MissPolicy, PolicyInputs, Reweigh

__all__ = [
    "MISS_POLICIES",
    "Gates",
    "LayerBook",
    "MissChoice",
    "MissPolicy",
    "PolicyInputs",
    "PriceBook",
    "Reweigh",
    "parse_miss_policy",
]
