"""Comparison of a recorded run with its simulation."""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from moe_tool.artifacts.access_trace import AccessTrace, CallCounts
from moe_tool.artifacts.hardware_profile import HardwareProfile
from moe_tool.artifacts.run_trace import RecordedCalls, RunTraceHeader
from moe_tool.artifacts.simulation_report import PolicyHits, RunComparison
from moe_tool.planning.model_costs import costs_of_bytes, timed_as
from moe_tool.policies.eviction import Belady, EvictionChoice
from moe_tool.policies.prefetch import parse_prefetch
from moe_tool.simulator.naive_replay import naive_replay
from moe_tool.simulator.run_trace import recorded_trace, replay_run
from moe_tool.simulator.time_model import call_times, forward_seconds


def compare_run(
    header: RunTraceHeader,
    calls: RecordedCalls,
    hardware: HardwareProfile,
    choices: Sequence[EvictionChoice] = (),
) -> RunComparison:
    """Return the comparison, with replays of the run's calls under other policies.

    Args:
        choices: other policies; one that needs more than was recorded is left out.
    """
    trace, counts = recorded_trace(header, calls), replay_run(header, calls)
    costs = costs_of_bytes(
        header.shape,
        hardware,
        record_bytes=header.record_size_bytes,
        matrix_bytes=header.matrix_bytes,
        n_matrices=header.n_matrices,
        bits=timed_as(header.precision),
        skeleton_bits=header.skeleton_precision.name,
        threads=header.threads,
    ).calls
    times = call_times(trace, counts, costs)
    seconds = forward_seconds(trace, times, costs)
    is_counted = np.arange(trace.n_calls) >= header.n_calls_before
    decodes, prompts = calls.is_decode & is_counted, ~calls.is_decode & is_counted
    # All calls of a forward have one phase.
    is_decode = np.zeros(trace.n_forwards, bool)
    is_decode[trace.forward[decodes]] = True
    n_tokens = max(1, header.decode_tokens)
    predicted_s = float(seconds[is_decode].sum())
    return RunComparison(
        hits=header.hits,
        predicted_hits=int(counts.hits[decodes].sum()),
        prompt_hits=header.prompt_hits,
        predicted_prompt_hits=int(counts.hits[prompts].sum()),
        prefetch_hits=header.prefetch_hits,
        predicted_prefetch_hits=int(counts.prefetch_hits[decodes].sum()),
        tokens_per_second=header.decode_tokens / max(1e-9, header.decode_seconds),
        predicted_tokens_per_second=header.decode_tokens / max(1e-9, predicted_s),
        stall_ms=1e3 * header.stall_seconds / n_tokens,
        predicted_stall_ms=1e3 * float(times.stall[decodes].sum()) / n_tokens,
        policies=tuple(_policies(header, calls, choices, trace, decodes)),
    )


def _policies(
    header: RunTraceHeader,
    calls: RecordedCalls,
    choices: Sequence[EvictionChoice],
    trace: AccessTrace,
    decodes: np.ndarray,
) -> Iterator[PolicyHits]:
    n = int(np.diff(calls.start)[decodes].sum())

    def row(name: str, counts: CallCounts) -> PolicyHits:
        hits, prefetches = int(counts.hits[decodes].sum()), int(counts.prefetches[decodes].sum())
        n_read = n - hits + prefetches
        return PolicyHits(
            eviction=name,
            hit_rate=hits / max(1, n),
            bytes_per_token=n_read * header.record_size_bytes / max(1, header.decode_tokens),
        )

    # What a part of a layer foretells depends on who was in memory, so only this run has it.
    others = () if parse_prefetch(header.prefetch).alpha is not None else choices
    for choice in others:
        lacks_scores = "scores" in choice.hints and calls.scores is None
        lacks_guesses = "predictions" in choice.hints and not len(calls.guesses)
        capacity = header.n_slots - len(header.pinned)
        is_too_small = choice.per_layer and capacity < len(header.shape.layers)
        if not (lacks_scores or lacks_guesses or is_too_small or choice.spec.pinned_share):
            yield row(choice.name, replay_run(header, calls, eviction=choice))
    if not header.pinned:
        bound = naive_replay(trace, partial(Belady, calls=trace.calls()), capacity=header.n_slots)
        name = "belady" if header.prefetch == "none" else "belady, without prefetch"
        yield row(name, bound)
