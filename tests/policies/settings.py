"""Parameters with which each miss policy does nothing, or something."""

from moe_tool.policies.misses import MISS_POLICIES

_INERT = {
    "priced": "nats-per-mb=0",
    "replica": "high=1",
    "near-tie": "alpha=0",
    "cache-prior": "lambda=0",
    "buddy": "rho=0",
    "next-ranked": "rho=0",
    "random": "rho=0",
    "drop": "rho=0",
    "prune": "share=0",
    "prune:learned": "rate=0",
    "prune:random": "rate=0",
}
_FIRES = {
    "replica": "high=0.3,low=0.5",
    "near-tie": "alpha=1",
    "cache-prior": "lambda=1",
    "prune": "share=0.8",
}
LOSSY = [name for name, spec in MISS_POLICIES.items() if spec.is_lossy]
INERT = {name: f"{name}:{_INERT[name]}" for name in LOSSY}
"""Lossy policy -> the policy with parameters with which it answers like `exact`"""
FIRES = {name: f"{name}:{_FIRES[name]}" if name in _FIRES else name for name in LOSSY}
"""Lossy policy -> the policy with parameters with which it changes answers of missing experts"""
ACT_ON_HITS = {"prune", "prune:learned", "prune:random"}
"""Policies that drop resident experts too"""
