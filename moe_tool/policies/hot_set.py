"""Hot set of a profile: its most used experts, all layers together."""

from collections.abc import Mapping, Sequence

from moe_tool.artifacts.expert_ids import ExpertKey


def hottest_first(loads: Mapping[int, Sequence[float]]) -> list[ExpertKey]:
    """Return all experts, the most used first, equal ones by layer and id, given decoder layer ->
    [E] share of tokens routed to each expert."""
    flat = {(layer, e): load for layer, row in loads.items() for e, load in enumerate(row)}
    return sorted(flat, key=lambda key: (-flat[key], key))


def n_pinned(share: float, *, n_slots: int, n_slots_min: int, n_experts: int) -> int:
    """Return the number of experts pinned by a share of the slots.

    Slots for one token's experts stay free for fetches, unless everything fits.
    """
    if n_slots >= n_experts:
        return int(share * n_experts)
    return max(0, min(int(share * n_slots), n_slots - n_slots_min))
