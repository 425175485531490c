"""Eviction policies: the choice of the expert that leaves the cache for another one."""

from moe_tool.policies.eviction.belady import Belady
from moe_tool.policies.eviction.choice import DEFAULT_EVICTION, EvictionChoice, parse_eviction
from moe_tool.policies.eviction.expert_cache import Entry, ExpertCache, MakeEviction
from moe_tool.policies.eviction.lru import Lru
from moe_tool.policies.eviction.protocol import CacheShape, Eviction
from moe_tool.policies.eviction.registry import EVICTION
from moe_tool.policies.eviction.smoe import gate_scores
from moe_tool.policies.eviction.spec import EvictionSpec

__all__ = [
    "DEFAULT_EVICTION",
    "EVICTION",
    "Belady",
    "CacheShape",
    "Entry",
    "Eviction",
    "EvictionChoice",
    "EvictionSpec",
    "ExpertCache",
    "Lru",
    "MakeEviction",
    "gate_scores",
    "parse_eviction",
]
