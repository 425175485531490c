"""Running with lossy answers to misses: who stays in which form by price, how patient the answers
are, what that is expected to cost and how fast it is."""

import math
from dataclasses import dataclass

from moe_tool.artifacts.pack_plan import Bits
from moe_tool.planning.plan_sources import PlanSources
from moe_tool.planning.profile_prices import nats_of_bits, profile_prices, replicas_below
from moe_tool.planning.ways_to_run import WayToRun
from moe_tool.policies.cheapest_residents import (
    ResidentChoice,
    cheapest_residents,
    free_for_residents,
)
from moe_tool.policies.misses import PolicyInputs, parse_miss_policy
from moe_tool.simulator.profile_trace import part_to_replay
from moe_tool.simulator.replay_misses import ReplayedMisses, replay_misses, resident_masks
from moe_tool.simulator.time_model import CallCosts

_PATIENCE = (math.inf, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
"""Of the typical price of a megabyte: around 1 something changes"""
_MAX_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class LossyWay:
    """One precision of the experts and one patience at a budget."""

    bits: Bits
    replicas: str
    """Cheaper forms to be packed"""
    policy: str
    residents: ResidentChoice
    replayed: ReplayedMisses
    nats_of_bits: float
    """Of the experts' own precision"""
    tokens_per_second: float

    @property
    def nats_per_token(self) -> float:
        """Expected divergence from the checkpoint."""
        return self.nats_of_bits + self.replayed.nats_per_token


def lossy_ways(sources: PlanSources, way: WayToRun, n_slots: int) -> list[LossyWay]:
    """Return the ways to run one precision lossily, the least patient first.

    Args:
        sources: of the profile.
        way: the same precision with every miss read: its records and speeds.
        n_slots: of full experts, that the budget has room for.
    """
    shape = sources.profile.header.shape
    replicas = replicas_below(way.bits)
    book = profile_prices(sources, way.bits, replicas)
    if n_slots >= shape.experts * len(shape.layers):
        return []
    of_bits = nats_of_bits(sources, way.bits)
    found = []
    for factor in _PATIENCE:
        patience = float(f"{factor * book.typical_nats_per_mb:.4g}")
        room = free_for_residents(
            n_slots, way.machine.n_slots_min, book.record_bytes, nats_per_mb=patience
        )
        if room <= 0:
            continue
        residents = cheapest_residents(book, sources.use, room_bytes=room, nats_per_mb=patience)
        masks = resident_masks(shape.layers, residents.by_form, n_experts=shape.experts)
        choice = parse_miss_policy("priced").with_value("nats-per-mb", patience)
        replayed = replay_misses(
            sources.profile,
            part_to_replay(sources.profile),
            choice.make(PolicyInputs(prices=book)),
            book,
            masks,
            way.machine.costs,
            max_tokens=_MAX_TOKENS,
        )
        found.append(
            LossyWay(
                bits=way.bits,
                replicas=replicas,
                policy=choice.name,
                residents=residents,
                replayed=replayed,
                nats_of_bits=of_bits,
                tokens_per_second=1 / _token_seconds(sources, way.machine.costs, replayed),
            )
        )
    return found


def _token_seconds(sources: PlanSources, costs: CallCosts, replayed: ReplayedMisses) -> float:
    """A token's time: nothing is left out, so that every slot is computed."""
    shape = sources.profile.header.shape
    per_layer = costs.layer_s + shape.top_k * costs.expert_s
    return costs.forward_s + len(shape.layers) * per_layer + replayed.stall_s
