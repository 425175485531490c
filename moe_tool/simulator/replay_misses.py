"""Replay of a miss policy over a profile's tokens under frozen residency: expected loss, reads."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moe_tool.artifacts.expert_ids import ExpertKey
from moe_tool.artifacts.routing import PRIMARY, Routing, count_answers
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.policies.misses import MissPolicy, PriceBook
from moe_tool.simulator.profile_trace import Part, rows_of_part
from moe_tool.simulator.time_model import CallCosts


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayedMisses:
    """Cost of a policy's answers, on average over the tokens."""

    tokens: int
    nats_per_token: float
    """Expected divergence from the same experts with every miss read"""
    bytes_per_token: float
    hit_rate: float
    """Share of (token, layer, expert) accesses that found the primary form in memory"""
    answered_otherwise: float
    """Slots per token answered by something else than the primary form"""
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
    """Replay the answers of a policy to every token of a part, each as a sequence of its own.

    Routing is the recorded one: effects of an answer on later layers are ignored.

    Args:
        resident: decoder layer -> [F, E] bool.
        costs: costs of a layer call; the time to read a smaller record is proportional to its size.
        max_tokens: limit on the tokens, in whole sequences.
    """
    rows = rows_of_part(profile, part, max_tokens)
    primary_bytes = book.record_bytes[PRIMARY]
    nats = np.zeros(len(rows))
    n_bytes = np.zeros(len(rows))
    stall = 0.0
    hits = slots = otherwise = 0
    for layer in profile.header.shape.layers:
        held, sizes = resident[layer], book.layers[layer].record_bytes
        routing = recorded_routing(profile, layer, rows, stored=sizes[PRIMARY] > 0)
        answers = policy.decide(routing, held)
        nats += book.spent(routing, answers)
        is_read = answers.present & ~held[answers.form, answers.expert]
        read = np.where(is_read, sizes[answers.form, answers.expert], 0).sum(axis=1)
        n_bytes += read
        n_here = (answers.present & ~is_read).sum(axis=1)
        waited = read / primary_bytes * costs.read_s - n_here * costs.expert_s
        stall += float(np.maximum(waited, 0.0).sum())
        hits += int(held[PRIMARY, routing.index[routing.present]].sum())
        slots += int(routing.present.sum())
        otherwise += count_answers(routing, answers).changed_answers
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
    layers: tuple[int, ...], by_form: tuple[tuple[ExpertKey, ...], ...], *, n_experts: int
) -> dict[int, np.ndarray]:
    """Return which experts of `by_form` are in memory: decoder layer -> [F, E] bool."""
    masks = {layer: np.zeros((len(by_form), n_experts), dtype=bool) for layer in layers}
    for form, keys in enumerate(by_form):
        for layer, expert in keys:
            masks[layer][form, expert] = True
    return masks


def recorded_routing(
    profile: ProfileReader, layer: int, rows: np.ndarray, *, stored: np.ndarray
) -> Routing:
    """Return a layer's routing of tokens, each a sequence of its own, `stored` the experts [E] that
    there are."""
    trace = profile.trace(layer)
    logits = trace.router_logits[rows]
    score = logits if trace.selection_score is None else trace.selection_score[rows]
    chosen = trace.top_k_index[rows].astype(np.int64)
    index = np.minimum(chosen, len(stored) - 1)
    present = (chosen < len(stored)) & stored[index]  # neither identity nor removed experts
    return Routing(
        layer=layer,
        index=index,
        present=present,
        weight=np.where(present, trace.top_k_weight[rows], 0).astype(np.float32),
        score=score,
        logits=logits,
        sequence=np.arange(len(rows)),
    )
