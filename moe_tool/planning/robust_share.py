"""Share of the worst case in the use that residents are chosen by, where none is asked for."""

import math

from moe_tool.artifacts.routing import PRIMARY
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.planning.plan_sources import PlanSources, domain_uses
from moe_tool.planning.profile_prices import prices_of_bits
from moe_tool.policies.cheapest_residents import ExpertUse, free_for_residents
from moe_tool.policies.leave_one_out import best_share, leave_one_out
from moe_tool.policies.misses import PriceBook
from moe_tool.policies.robust_use import robust_use

_PACKED_ROOM = 0.5
"""Part of the experts' bytes in memory, where a pack without a plan does not know better"""


def share_for_slots(sources: PlanSources, book: PriceBook, n_slots: int, free: int) -> float:
    """Return the share for a plan, see `leave_one_out`.

    Args:
        n_slots: room for primary records.
        free: slots of them that one token's misses need.
    """
    room = free_for_residents(n_slots, free, book.record_bytes, nats_per_mb=math.inf)
    if room <= 0:
        return 0.0
    return best_share(
        leave_one_out(book, sources.by_domain, sources.domain_tokens, room_bytes=room)
    )


def share_for_pack(profile: ProfileReader, bits: str, replicas: str) -> float:
    """Return the share for a pack without a plan, with half of the experts' bytes in memory.

    Stand-ins, and the errors of other replicas than integers, are not known yet and left out.
    """
    statistics = {layer: profile.statistics(layer) for layer in profile.layers}
    book = prices_of_bits(profile.header, statistics, bits, replicas)
    everything = sum(int(each.record_bytes[PRIMARY].sum()) for each in book.layers.values())
    uses, n_tokens = domain_uses(profile)
    room = int(_PACKED_ROOM * everything)
    return best_share(leave_one_out(book, uses, n_tokens, room_bytes=room))


def use_with_share(sources: PlanSources, share: float) -> dict[int, ExpertUse]:
    """Return the use that residents are chosen by, by decoder layer."""
    return {
        layer: robust_use(mean, sources.by_domain[layer], share)
        for layer, mean in sources.use.items()
    }
