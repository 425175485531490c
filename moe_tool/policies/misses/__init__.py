"""Answers to a miss: a wanted expert that is not in the fast tier."""

from moe_tool.policies.misses.choice import EXACT_POLICY as EXACT_POLICY
from moe_tool.policies.misses.choice import PRICED_POLICY as PRICED_POLICY
from moe_tool.policies.misses.choice import MissChoice as MissChoice
from moe_tool.policies.misses.choice import parse_miss_policy as parse_miss_policy
from moe_tool.policies.misses.gates import Gates as Gates
from moe_tool.policies.misses.price_book import LayerBook as LayerBook
from moe_tool.policies.misses.price_book import PriceBook as PriceBook
from moe_tool.policies.misses.protocol import MissPolicy as MissPolicy
from moe_tool.policies.misses.protocol import PolicyInputs as PolicyInputs
from moe_tool.policies.misses.protocol import Reweigh as Reweigh
from moe_tool.policies.misses.registry import MISS_POLICIES as MISS_POLICIES
from moe_tool.policies.misses.spec import PolicySpec as PolicySpec
from moe_tool.policies.misses.strength import StrengthGrid as StrengthGrid
