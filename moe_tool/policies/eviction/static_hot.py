"""Pin the profile's hottest experts; only the slots of one token are for others."""

from moe_tool.policies.eviction.lru import Lru
from moe_tool.policies.eviction.spec import EvictionSpec

SPEC = EvictionSpec(
    name="static-hot",
    summary="none of the profile's hottest experts: only the slots of one token change",
    make=Lru,
    pinned_share=1.0,
    compiled="lru",
    is_stack=True,
)
