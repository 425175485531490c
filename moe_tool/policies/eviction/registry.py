"""Every eviction policy, one row each: `--eviction`, docs and contract tests read them."""

from collections.abc import Mapping

from moe_tool.policies.eviction import (
    class_lru,
    expertflow,
    fifo,
    hobbit,
    layer_lru,
    lfu,
    lfu_ghost,
    lru,
    random_victim,
    s3_fifo,
    smoe,
)
from moe_tool.policies.eviction.spec import EvictionSpec

EVICTION: Mapping[str, EvictionSpec] = {
    spec.name: spec
    for spec in (
        lru.SPEC,
        lfu.SPEC,
        fifo.SPEC,
        s3_fifo.SPEC,
        lru.STATIC_HOT,
        lru.PINNED,
        hobbit.SPEC,
        smoe.SPEC,
        expertflow.SPEC,
        layer_lru.SPEC,
        class_lru.SPEC,
        lfu_ghost.SPEC,
        random_victim.SPEC,
    )
}
"""Specs by the name that `--eviction` takes"""
