"""Every miss policy, one row each: `--policy`, docs, calibrate and contract tests read them."""

from collections.abc import Mapping

from moe_tool.policies.misses import (
    buddy,
    cache_prior,
    drop,
    exact,
    near_tie,
    next_ranked,
    priced,
    prune,
    prune_learned,
    prune_random,
    random_resident,
    replica,
    smoe,
)
from moe_tool.policies.misses.spec import PolicySpec

MISS_POLICIES: Mapping[str, PolicySpec] = {
    spec.name: spec
    for spec in (
        exact.SPEC,
        priced.SPEC,
        replica.SPEC,
        near_tie.SPEC,
        smoe.SPEC,
        cache_prior.SPEC,
        buddy.SPEC,
        next_ranked.SPEC,
        random_resident.SPEC,
        drop.SPEC,
        prune.SPEC,
        prune_learned.SPEC,
        prune_random.SPEC,
    )
}
"""Specs by the name that `--policy` takes, in the order of tables"""
