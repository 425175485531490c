"""Eviction policies: the choice of the expert that leaves the cache for another one."""

from moe_tool.policies.eviction.belady import Belady as Belady
from moe_tool.policies.eviction.choice import DEFAULT_EVICTION as DEFAULT_EVICTION
from moe_tool.policies.eviction.choice import EvictionChoice as EvictionChoice
from moe_tool.policies.eviction.choice import parse_eviction as parse_eviction
from moe_tool.policies.eviction.expert_cache import Entry as Entry
from moe_tool.policies.eviction.expert_cache import ExpertCache as ExpertCache
from moe_tool.policies.eviction.expert_cache import MakeEviction as MakeEviction
from moe_tool.policies.eviction.lru import Lru as Lru
from moe_tool.policies.eviction.protocol import CacheShape as CacheShape
from moe_tool.policies.eviction.protocol import Eviction as Eviction
from moe_tool.policies.eviction.registry import EVICTION as EVICTION
from moe_tool.policies.eviction.smoe import gate_scores as gate_scores
from moe_tool.policies.eviction.spec import EvictionSpec as EvictionSpec
