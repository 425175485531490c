"""Substitution of experts in open slots, slot by slot in descending gate weight.

BuddyMoE's kernel claims stand-ins with atomics, so that its result depends on the order of threads;
here the order of slots makes it reproducible. No loop runs over tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from moe_tool.artifacts.routing import PRIMARY, Answers, Routing, keep
from moe_tool.policies.misses.gates import OpenSlots
from moe_tool.policies.misses.protocol import Reweigh


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """Stand-ins for one slot of n tokens."""

    expert: np.ndarray
    """[n] int64; -1 without a stand-in"""
    scale: np.ndarray | None = None
    """[n] float32 factor on the gate weight; None: 1"""


Picker = Callable[[np.ndarray, np.ndarray, np.ndarray], Pick]
"""Function (token [n], position [n], free [n, E] bool) -> Pick; free experts are resident and not
in use by the token"""


def substitute(routing: Routing, resident: np.ndarray, slots: OpenSlots, pick: Picker) -> Answers:
    """Return the answers with stand-ins where `pick` finds one; other slots are unchanged.

    A stand-in gets the gate weight of the replaced expert times its scale. A token's wanted experts
    are never its stand-ins, and none is used twice by a token. `pick` is called once for each of
    the K ranks of gate weight.
    """
    n_tokens, top_k = routing.index.shape
    every = np.arange(n_tokens)
    expert, weight = routing.index.copy(), routing.weight.copy()
    used = routing.is_wanted(resident.shape[1])
    n_filled = np.zeros(n_tokens, dtype=np.int64)
    for rank in range(top_k):
        position = slots.order[:, rank]
        token = np.flatnonzero(slots.open[every, position] & (n_filled < slots.limit))
        if token.size == 0:
            continue
        picked = pick(token, position[token], resident[PRIMARY] & ~used[token])
        found = picked.expert >= 0
        token, chosen = token[found], picked.expert[found]
        position = position[token]
        expert[token, position] = chosen
        if picked.scale is not None:
            weight[token, position] *= picked.scale[found]
        used[token, chosen] = True
        n_filled[token] += 1
    return replace(keep(routing), expert=expert, weight=weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offers:
    """Competition of experts for the slots of one layer call."""

    own: np.ndarray
    """[T, K]: scores of the wanted experts"""
    may_go: np.ndarray
    """[T, K] bool: slots that may be given away"""
    bid: np.ndarray
    """[T, E]: bids of the experts that may come; -inf for all others"""
    floor: np.ndarray
    """[T, K]: bid that has to be exceeded for each slot"""


def outbid(routing: Routing, offers: Offers, reweigh: Mapping[int, Reweigh]) -> Answers:
    """Return the answers with the n-th lowest slot that may go given to the n-th highest bid, if
    that exceeds the slot's floor; changed sets are weighed by the rule of their layer."""
    assert routing.logits is not None, "the policy asked for them"
    going = np.argsort(np.where(offers.may_go, offers.own, np.inf), axis=1, kind="stable")
    coming = np.argsort(-offers.bid, axis=1, kind="stable")
    every, expert = np.arange(len(going)), routing.index.copy()
    for place in range(min(going.shape[1], coming.shape[1])):
        position, newcomer = going[:, place], coming[:, place]
        moves = offers.may_go[every, position]
        moves &= offers.bid[every, newcomer] > offers.floor[every, position]
        token = np.flatnonzero(moves)
        expert[token, position[token]] = newcomer[token]
    moved = np.flatnonzero((expert != routing.index).any(axis=1))
    if not moved.size:
        return keep(routing)
    weight = routing.weight.astype(np.float32)
    weight[moved] = reweigh[routing.layer](
        routing.logits[moved], expert[moved], routing.present[moved]
    )
    return replace(keep(routing), expert=expert, weight=weight)
