"""Least recently used, beside the profile's hottest experts in half of the slots."""

from moe_tool.policies.eviction.lru import Lru
from moe_tool.policies.eviction.spec import EvictionSpec

SPEC = EvictionSpec(
    name="pinned+lru",
    summary="as lru, beside the hottest experts in half of the slots",
    make=Lru,
    pinned_share=0.5,
    compiled="lru",
    is_stack=True,
)
