"""Replay of a recorded run with its cache, under its own or another eviction policy."""

from dataclasses import replace

import numpy as np

from moe_tool.artifacts.access_trace import AccessTrace, CallCounts
from moe_tool.artifacts.expert_ids import LayerIds
from moe_tool.artifacts.run_trace import RecordedCalls, RunTraceHeader
from moe_tool.policies.eviction import EvictionChoice, parse_eviction
from moe_tool.policies.prefetch import parse_prefetch
from moe_tool.simulator.replay import Replayer


def recorded_trace(header: RunTraceHeader, calls: RecordedCalls) -> AccessTrace:
    """Return the calls of a run, prompt and decoding."""
    n_layers = len(header.shape.layers)
    begins = np.diff(calls.layer, prepend=n_layers) <= 0
    has_guesses = len(calls.guesses) > 0
    return AccessTrace(
        n_layers=n_layers,
        n_experts=header.shape.experts,
        layer=calls.layer,
        start=calls.start,
        keys=calls.keys,
        forward=(np.cumsum(begins) - 1).astype(np.int32),
        scores=calls.scores,
        guess_start=calls.guess_start if has_guesses else None,
        guesses=calls.guesses if has_guesses else None,
    )


def replay_run(
    header: RunTraceHeader, calls: RecordedCalls, *, eviction: EvictionChoice | None = None
) -> CallCounts:
    """Return the counts of every call of a run, under its own policy or another one.

    Under its own policy they equal the counts of the run.
    """
    choice = eviction or parse_eviction(header.eviction)
    ids = LayerIds(header.shape.layers, header.shape.experts)
    pinned = [ids.number(key) for key in header.pinned]
    trace = recorded_trace(header, calls)
    depth = parse_prefetch(header.prefetch).depth
    if "predictions" not in choice.hints and not depth:
        trace = replace(trace, guess_start=None, guesses=None)
    return Replayer(trace).replay(
        choice, capacity=header.n_slots - len(pinned), pinned=pinned, prefetch_depth=depth
    )
