"""Settings of each lossy policy under which it does nothing, or something, as its spec says."""

from moe_tool.policies.misses import MISS_POLICIES

LOSSY = [name for name, spec in MISS_POLICIES.items() if spec.is_lossy]
INERT = {name: f"{name}:{MISS_POLICIES[name].inert}" for name in LOSSY}
"""Lossy policy -> the policy with parameters with which it answers like `exact`"""
FIRES = {name: f"{name}:{MISS_POLICIES[name].fires}".removesuffix(":") for name in LOSSY}
"""Lossy policy -> the policy with parameters with which it changes answers of missing experts"""
ACT_ON_HITS = {name for name in LOSSY if MISS_POLICIES[name].acts_on_hits}
"""Policies that drop resident experts too"""
