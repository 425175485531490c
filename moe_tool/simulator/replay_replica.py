"""Replay of `replica` over a profile's tokens with a cache of each form: expected loss, reads."""

from dataclasses import dataclass

import numpy as np

from moe_tool.artifacts.access_trace import AccessTrace
from moe_tool.artifacts.routing import count_answers, leave_out
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.policies.eviction import EvictionChoice
from moe_tool.policies.misses import PriceBook
from moe_tool.simulator.profile_trace import Part, decode_trace, rows_of_part
from moe_tool.simulator.replay_misses import ReplayedMisses, recorded_routing
from moe_tool.simulator.replica_answers import replica_answers
from moe_tool.simulator.time_model import CallCosts
from moe_tool.simulator.two_caches import CHEAPER, NOTHING, TwoCounts, replay_two_caches


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaTrace:
    """Accesses of a part's tokens, and what answers each that is not in the primary cache."""

    part: Part
    max_tokens: int | None
    """Limit that the tokens were read with, in whole sequences"""
    trace: AccessTrace
    answer: np.ndarray
    """[A] uint8, see `replica_answers`"""


def read_replica_trace(
    profile: ProfileReader,
    part: Part,
    limits: dict[int, tuple[float, float]],
    *,
    max_tokens: int | None = None,
) -> ReplicaTrace:
    """Return a part's accesses under T1 and T2 by decoder layer.

    Raises:
        ValueError: a token chose an expert twice.
    """
    return ReplicaTrace(
        part=part,
        max_tokens=max_tokens,
        trace=decode_trace(profile, part, max_tokens=max_tokens),
        answer=replica_answers(profile, part, limits, max_tokens=max_tokens),
    )


def replay_replica(
    traced: ReplicaTrace, eviction: EvictionChoice, slots: tuple[int, int]
) -> TwoCounts:
    """Return the counts of caches with `slots` of the primary and of the cheaper form."""
    capacity, cheaper = slots
    return replay_two_caches(
        traced.trace, traced.answer, eviction, capacity=capacity, cheaper_capacity=cheaper
    )


def cost_of_replica(
    profile: ProfileReader,
    traced: ReplicaTrace,
    counts: TwoCounts,
    book: PriceBook,
    costs: CallCosts,
) -> ReplayedMisses:
    """Return the cost of a replay, whose cheaper form is the book's first one after the primary.

    Routing is the recorded one: effects of an answer on later layers are ignored.

    Args:
        costs: costs of a layer call; the time to read a smaller record is proportional to its size.
    """
    rows = rows_of_part(profile, traced.part, traced.max_tokens)
    shape = profile.header.shape
    given = counts.given.reshape(len(rows), len(shape.layers), shape.top_k)
    nats, otherwise = 0.0, 0
    for at, layer in enumerate(shape.layers):
        stored = np.ones(shape.experts, dtype=bool)
        routing = recorded_routing(profile, layer, rows, stored=stored)
        by_slot = np.empty_like(given[:, at])  # accesses are by ascending id
        np.put_along_axis(by_slot, np.argsort(routing.index, axis=1), given[:, at], axis=1)
        form = (by_slot == CHEAPER).astype(np.int64)
        answers = leave_out(routing, by_slot == NOTHING, form)
        nats += float(book.spent(routing, answers).sum())
        otherwise += count_answers(routing, answers).changed_answers
    ratio = book.record_bytes[1] / book.record_bytes[0]
    whole = int(counts.misses.sum())
    read = counts.penalties(ratio)  # [C] primary records
    n_here = counts.uses - counts.misses + (counts.cheaper_uses - counts.cheaper_misses)
    stall = np.maximum(read * costs.read_s - n_here * costs.expert_s, 0.0)
    n_tokens = max(1, len(rows))
    return ReplayedMisses(
        tokens=len(rows),
        nats_per_token=nats / n_tokens,
        bytes_per_token=float(read.sum()) * book.record_bytes[0] / n_tokens,
        hit_rate=(int(counts.uses.sum()) - whole) / max(1, len(traced.trace.keys)),
        answered_otherwise=otherwise / n_tokens,
        stall_s=float(stall.sum()) / n_tokens,
    )
