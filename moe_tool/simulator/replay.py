"""Replay of a trace through an expert cache, compiled if the kernels were built."""

from collections.abc import Collection
from functools import partial

import numpy as np

from moe_tool.artifacts.access_trace import AccessTrace, CallCounts
from moe_tool.native.kernels import is_built
from moe_tool.native.replay import Calls, compiled_replay, compiled_stack_depths
from moe_tool.policies.eviction import Belady, EvictionChoice
from moe_tool.simulator.naive_replay import naive_replay


class Replayer:
    """Trace prepared once for any number of policies and capacities."""

    def __init__(self, trace: AccessTrace) -> None:
        """Describe the trace to the compiled replay.

        Raises:
            ValueError: its arrays do not fit together.
        """
        self.trace = trace
        self._calls = Calls(trace) if is_built() else None
        self._largest_call = int(trace.sizes.max()) if trace.n_calls else 0
        self._depths: dict[str, np.ndarray] = {}

    def replay(
        self,
        choice: EvictionChoice,
        *,
        capacity: int,
        pinned: Collection[int] = (),
        prefetch_depth: int = 0,
    ) -> CallCounts:
        """Return the counts under a policy; see `naive_replay`."""
        compiled = choice.spec.compiled
        if self._calls is None or compiled is None:
            return naive_replay(
                self.trace,
                choice.make,
                capacity=capacity,
                per_layer=choice.per_layer,
                pinned=pinned,
                prefetch_depth=prefetch_depth,
            )
        is_plain = not (choice.per_layer or pinned or prefetch_depth)
        if compiled == "lru" and is_plain and capacity >= self._largest_call:
            return self._by_depth("lru", capacity)
        mask = None
        if pinned:
            mask = np.zeros(self.trace.n_keys, np.uint8)
            mask[list(pinned)] = 1
        return compiled_replay(
            self._calls,
            compiled,
            list(choice.parameters.values()),
            capacity=capacity,
            per_layer=choice.per_layer,
            pinned=mask,
            prefetch_depth=prefetch_depth,
        )

    def belady(self, capacity: int) -> CallCounts:
        """Return the counts under Belady's optimal policy."""
        if self._calls is None or capacity < self._largest_call:
            make = partial(Belady, calls=self.trace.calls())
            return naive_replay(self.trace, make, capacity=capacity)
        return self._by_depth("belady", capacity)

    def _by_depth(self, kind: str, capacity: int) -> CallCounts:
        """Return the counts of LRU or Belady, which are stack algorithms: one pass over the trace
        serves every capacity that holds any call (Mattson et al., IBM Systems J. 9(2), 1970)."""
        assert self._calls is not None
        depths = self._depths.get(kind)
        if depths is None:
            upcoming = next_uses(self.trace) if kind == "belady" else None
            depths = self._depths[kind] = compiled_stack_depths(self._calls, upcoming)
        counts = CallCounts.zeros(self.trace.n_calls)
        is_hit = (depths > 0) & (depths <= capacity)
        sums = np.concatenate([[0], np.cumsum(is_hit)])
        start = self.trace.start
        np.copyto(counts.hits, sums[start[1:]] - sums[start[:-1]], casting="unsafe")
        return counts


def next_uses(trace: AccessTrace) -> np.ndarray:
    """Return the next call of each access's expert, [A] int64; C where there is none."""
    call = np.repeat(np.arange(trace.n_calls), trace.sizes)  # [A]
    order = np.lexsort((call, trace.keys))
    upcoming = np.full(len(trace.keys), trace.n_calls, dtype=np.int64)
    same = trace.keys[order][1:] == trace.keys[order][:-1]
    upcoming[order[:-1][same]] = call[order[1:][same]]
    return upcoming
