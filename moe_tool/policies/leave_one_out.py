"""Share of the worst case in the use that residents are chosen by, from the profile's domains."""

import math
from collections.abc import Mapping, Sequence

from moe_tool.policies.cheapest_residents import ExpertUse, cheapest_residents, residents_price
from moe_tool.policies.misses.price_book import PriceBook
from moe_tool.policies.robust_use import mean_use, robust_use

SHARES = (0.0, 0.25, 0.5, 1.0)
_LEAST_GAIN = 0.05
"""Part of the price of unknown text that a share has to save: less may be chance"""
_NO_WORSE = 0.02
"""Part of the price of unknown text that a smaller share may cost: it serves known text better"""


def leave_one_out(
    book: PriceBook,
    by_domain: Mapping[int, Sequence[ExpertUse]],
    n_tokens: Sequence[int],
    *,
    room_bytes: int,
    shares: Sequence[float] = SHARES,
) -> dict[float, tuple[float, ...]]:
    """Return, by share, the expected price of misses in nats per token on each domain, if the
    residents are chosen without it; no prices with fewer than two domains.

    Args:
        by_domain: decoder layer -> use over the tokens of each domain.
        n_tokens: tokens of each domain.
        room_bytes: limit of the residents' size. No miss is read.
    """
    n_domains = len(n_tokens) if len(n_tokens) > 1 else 0
    found: dict[float, list[float]] = {share: [] for share in shares}
    for left_out in range(n_domains):
        others = [at for at in range(n_domains) if at != left_out]
        counts = [n_tokens[at] for at in others]
        own = {layer: uses[left_out] for layer, uses in by_domain.items()}
        for share, prices in found.items():
            use = {}
            for layer, uses in by_domain.items():
                known = [uses[at] for at in others]
                use[layer] = robust_use(mean_use(known, counts), known, share)
            chosen = cheapest_residents(book, use, room_bytes=room_bytes)
            prices.append(residents_price(book, own, chosen.by_form))
    return {share: tuple(prices) for share, prices in found.items()}


def best_share(prices: Mapping[float, Sequence[float]]) -> float:
    """Return the smallest share whose mean price is within 2 % of the least, or 0 if that saves
    5 % or less, or if there are no prices.

    Args:
        prices: share -> price on each left-out domain, 0 among the shares.
    """
    sums = {share: math.fsum(each) for share, each in prices.items()}
    least = min(sums.values())
    if least >= (1 - _LEAST_GAIN) * sums[0.0]:
        return 0.0
    return min(share for share, price in sums.items() if price <= (1 + _NO_WORSE) * least)
