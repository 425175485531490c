"""A miss policy over a profile's tokens, with who is in memory frozen: what its answers are
expected to cost, and what it reads."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moe_tool.artifacts.routing import FULL, Routing
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.policies.misses import MissPolicy, PriceBook
from moe_tool.simulator.profile_trace import Part, rows_of_part
from moe_tool.simulator.time_model import CallCosts


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayedMisses:
    """What the policy did, on average over the tokens."""

    tokens: int
    nats_per_token: float
    """Expected divergence from the same experts with every miss read"""
    bytes_per_token: float
    """Read"""
    hit_rate: float
    """Of (token, layer, expert) accesses: in memory in full"""
    answered_otherwise: float
    """Slots per token that something else answers"""
    stall_s: float
    """Seconds per token in which computation waits for reads"""


def replay_misses(
    profile: ProfileReader,
    part: Part,
    policy: MissPolicy,
    book: PriceBook,
    resident: Mapping[int, np.ndarray],
    costs: CallCosts,
    *,
    max_tokens: int | None = None,
) -> ReplayedMisses:
    """Let a policy answer every token of a part, each as if it were a sequence of its own.

    Routing is taken from the profile as it was recorded: what an answer changes in the layers that
    follow is not seen, in memory or in price.

    Args:
        profile: is read layer by layer.
        part: which sequences.
        policy: any.
        book: its prices judge the answers, whoever gave them.
        resident: decoder layer -> [L, E] bool.
        costs: of a layer call; a record that is smaller than a full one is read in that share of
            the time.
        max_tokens: at most about so many, in whole sequences.
    """
    rows = rows_of_part(profile, part, max_tokens)
    sizes = np.array(book.record_bytes, dtype=np.float64)
    nats = np.zeros(len(rows))
    n_bytes = np.zeros(len(rows))
    stall = 0.0
    hits = slots = otherwise = 0
    for layer in profile.header.shape.layers:
        routing = _routing(profile, layer, rows)
        held = resident[layer]
        answers = policy.decide(routing, held)
        nats += book.spent(routing, answers)
        level = np.full(answers.expert.shape, FULL) if answers.level is None else answers.level
        expert = np.maximum(answers.expert, 0)
        is_read = (answers.expert >= 0) & ~held[level, expert]
        read = np.where(is_read, sizes[level], 0.0).sum(axis=1)
        n_bytes += read
        n_here = (answers.expert >= 0).sum(axis=1) - is_read.sum(axis=1)
        waited = read / sizes[FULL] * costs.read_s - n_here * costs.expert_s
        stall += float(np.maximum(waited, 0.0).sum())
        is_one = routing.index < held.shape[1]  # not an identity expert
        hits += int(held[FULL, routing.index[is_one]].sum())
        slots += int(is_one.sum())
        otherwise += answers.substituted + answers.dropped + answers.lowered
    n_tokens = max(1, len(rows))
    return ReplayedMisses(
        tokens=len(rows),
        nats_per_token=float(nats.sum()) / n_tokens,
        bytes_per_token=float(n_bytes.sum()) / n_tokens,
        hit_rate=hits / max(1, slots),
        answered_otherwise=otherwise / n_tokens,
        stall_s=stall / n_tokens,
    )


def resident_masks(
    layers: tuple[int, ...],
    by_level: tuple[tuple[tuple[int, int], ...], ...],
    *,
    n_experts: int,
) -> dict[int, np.ndarray]:
    """Return who is in memory as decoder layer -> [L, E] bool.

    Args:
        layers: of the model.
        by_level: the (layer, expert) pairs that are held in each form.
        n_experts: E.
    """
    masks = {layer: np.zeros((len(by_level), n_experts), dtype=bool) for layer in layers}
    for level, keys in enumerate(by_level):
        for layer, expert in keys:
            masks[layer][level, expert] = True
    return masks


def _routing(profile: ProfileReader, layer: int, rows: np.ndarray) -> Routing:
    trace = profile.trace(layer)
    logits = trace.router_logits[rows]
    score = logits if trace.selection_score is None else trace.selection_score[rows]
    return Routing(
        layer=layer,
        index=trace.top_k_index[rows].astype(np.int64),
        weight=trace.top_k_weight[rows].astype(np.float32),
        score=score,
        logits=logits,
        sequence=np.arange(len(rows)),
    )
