"""Memory or tokens of text with which a failed calibration would keep its KL limit."""

import math
from bisect import bisect_left

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.policies.cheapest_residents import (
    cheapest_residents,
    free_for_residents,
    residents_price,
)
from moe_tool.policies.misses import PriceBook
from moe_tool.runtime.price_list import expert_use, resident_use
from moe_tool.runtime.residency import n_slots_min


def least_share(
    manifest: BundleManifest, book: PriceBook, *, max_kl: float, nats_per_price: float
) -> float | None:
    """Return the least share of the experts' bytes, 0 to 1, at which answers without any fetch are
    expected to keep a limit; None if only all experts do.

    Args:
        manifest: manifest of a bundle with prices.
        max_kl: the limit, nats per token.
        nats_per_price: measured nats per expected nat.
    """
    use, chosen_by = expert_use(manifest), resident_use(manifest)
    assert use is not None and chosen_by is not None
    free = n_slots_min(manifest)

    def keeps(n_slots: int) -> bool:
        room = free_for_residents(n_slots, free, book.record_bytes, nats_per_mb=math.inf)
        if room <= 0:
            return False
        chosen = cheapest_residents(book, chosen_by, room_bytes=room)
        price = residents_price(book, use, chosen.by_form)
        return price * nats_per_price <= max_kl

    everything = len(manifest.primary_records)
    n_slots = bisect_left(range(everything), True, lo=free + 1, key=keeps)
    return n_slots / everything if n_slots < everything else None


def enough_tokens(tokens: int, *, mean: float, upper: float, max_kl: float) -> int | None:
    """Return the tokens of text that would make an interval narrow enough; None if the mean itself
    exceeds the limit.

    Args:
        tokens: tokens behind the interval, whose width shrinks with their square root.
        upper: upper end of the interval around `mean`.
    """
    if mean >= max_kl:
        return None
    return math.ceil(tokens * ((upper - mean) / (max_kl - mean)) ** 2)
