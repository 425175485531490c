"""Lossy candidates: residents and their forms, nats per MB, and expected costs."""

import math

from moe_tool.planning.candidate import LossyAnswers, PackedExperts
from moe_tool.planning.model_costs import record_precision
from moe_tool.planning.plan_sources import PlanSources
from moe_tool.planning.profile_prices import profile_prices, replicas_below
from moe_tool.planning.robust_share import share_for_slots, use_with_share
from moe_tool.policies.cheapest_residents import cheapest_residents, free_for_residents
from moe_tool.policies.misses import PRICED_POLICY, PolicyInputs
from moe_tool.simulator.profile_trace import part_to_replay
from moe_tool.simulator.replay_misses import replay_misses, resident_masks

_NATS_PER_MB_FACTORS = (math.inf, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
"""Multiples of the typical nats per MB to try; infinite: no miss is read"""
_MAX_TOKENS = 8192


def lossy_answers(
    sources: PlanSources, experts: PackedExperts, n_slots: int, robust: float | None = 0.0
) -> list[LossyAnswers]:
    """Return the ways to answer misses by price, the fewest reads first; none for mixed widths,
    whose prices a profile lacks.

    Args:
        n_slots: room for primary records.
        robust: share of the worst case over domains in the use that residents are chosen by; None:
            by leaving each domain out in turn. Expected costs are always those of the mean use.
    """
    if experts.bits == "mixed" or n_slots >= experts.n_experts:
        return []
    shape, costs = sources.profile.header.shape, experts.machine.costs
    # Every slot is computed, since nothing is dropped.
    layer_s = costs.layer_s + shape.top_k * costs.expert_s
    computed_s = costs.forward_s + len(shape.layers) * layer_s
    replicas = replicas_below(record_precision(sources.profile.header, experts.bits))
    book = profile_prices(sources, experts.bits, replicas)
    n_free = experts.machine.n_slots_min
    if robust is None:
        robust = share_for_slots(sources, book, n_slots, n_free)
    use, part = use_with_share(sources, robust), part_to_replay(sources.profile)
    found = []
    for factor in _NATS_PER_MB_FACTORS:
        price = float(f"{factor * book.typical_nats_per_mb:.4g}")
        room = free_for_residents(n_slots, n_free, book.record_bytes, nats_per_mb=price)
        if room <= 0:
            continue
        residents = cheapest_residents(book, use, room_bytes=room, nats_per_mb=price)
        choice = PRICED_POLICY.with_value("nats-per-mb", price)
        replayed = replay_misses(
            sources.profile,
            part,
            choice.make(PolicyInputs(prices=book)),
            book,
            resident_masks(shape.layers, residents.by_form, n_experts=shape.experts),
            costs,
            max_tokens=_MAX_TOKENS,
        )
        found.append(
            LossyAnswers(
                policy=choice,
                replicas=replicas,
                record_bytes=book.record_bytes,
                residents=residents,
                robust=robust,
                replayed=replayed,
                tokens_per_second=1 / (computed_s + replayed.stall_s),
            )
        )
    return found
