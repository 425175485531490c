"""Distribution of expert slots over record sizes, and their bytes."""

from bisect import bisect_right
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRoom:
    """Experts with records of one size."""

    record_bytes: int
    n_experts: int
    """Experts of all layers: the most slots that make sense"""
    n_slots_min: int
    """Fewest slots with which a layer can run"""


def min_slots(top_k: int, n_experts: int) -> int:
    """Return the fewest slots of a pool: one token's experts of one layer, and one for prefetch.

    Args:
        n_experts: experts of all layers that share the pool, an upper bound.
    """
    return min(top_k + 1, n_experts)


def split_slots(n_slots: int, rooms: tuple[ExpertRoom, ...]) -> tuple[int, ...]:
    """Return the slots of each size: proportional to its experts, but at least `n_slots_min`.

    Monotonic in `n_slots`, the total; with as many slots as experts, every expert gets one.
    """
    n_experts = sum(room.n_experts for room in rooms)
    return tuple(
        min(room.n_experts, max(room.n_slots_min, n_slots * room.n_experts // n_experts))
        for room in rooms
    )


def bytes_of_slots(slots: tuple[int, ...], rooms: tuple[ExpertRoom, ...]) -> int:
    """Return the total bytes of slots, given by size."""
    return sum(count * room.record_bytes for count, room in zip(slots, rooms, strict=True))


def slots_beside(
    total_bytes: int,
    rooms: tuple[ExpertRoom, ...],
    cheaper_bytes: int,
    *,
    part: float,
    n_least: int,
) -> tuple[tuple[int, ...], int] | None:
    """Return the slots of primary records, by size, and those of a cheaper form that share their
    bytes; None if both do not fit.

    Args:
        cheaper_bytes: size of a record of the cheaper form.
        part: share of the bytes that it gets.
        n_least: fewest slots that it needs.
    """
    n_cheaper = max(n_least, int(part * total_bytes) // cheaper_bytes)
    slots = slots_within(total_bytes - n_cheaper * cheaper_bytes, rooms)
    if bytes_of_slots(slots, rooms) + n_cheaper * cheaper_bytes > total_bytes:
        return None
    return slots, n_cheaper


def slots_within(room_bytes: int, rooms: tuple[ExpertRoom, ...]) -> tuple[int, ...]:
    """Return the most slots that fit, by size; the minimum must fit."""
    n_experts = sum(room.n_experts for room in rooms)
    n_slots = bisect_right(
        range(1, n_experts + 1),
        room_bytes,
        key=lambda total: bytes_of_slots(split_slots(total, rooms), rooms),
    )
    return split_slots(n_slots, rooms)
