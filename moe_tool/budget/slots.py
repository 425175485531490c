"""Expert slots where records have several sizes: their bytes, and who gets how many."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRoom:
    """The experts whose records have one size."""

    record_bytes: int
    """Bytes of one slot"""
    n_experts: int
    """Experts of all layers: more slots than these are never made"""
    n_slots_min: int
    """Slots without which a layer cannot run"""


def min_slots(top_k: int, n_experts: int) -> int:
    """Return the fewest slots that a pool can run with: one token's experts of one layer, and one
    to read ahead; all experts where there are not so many.

    Args:
        top_k: experts per token and layer.
        n_experts: experts of all layers that share the pool.
    """
    return min(top_k + 1, n_experts)


def split_slots(n_slots: int, rooms: tuple[ExpertRoom, ...]) -> tuple[int, ...]:
    """Return the slots of each size: in proportion to its experts, at least what it cannot do
    without; never fewer for more `n_slots`.

    Args:
        n_slots: of all sizes together; as many as there are experts: everything.
        rooms: by size.
    """
    n_experts = sum(room.n_experts for room in rooms)
    return tuple(
        min(room.n_experts, max(room.n_slots_min, n_slots * room.n_experts // n_experts))
        for room in rooms
    )


def bytes_of_slots(slots: tuple[int, ...], rooms: tuple[ExpertRoom, ...]) -> int:
    """Return the bytes that slots take, by size."""
    return sum(count * room.record_bytes for count, room in zip(slots, rooms, strict=True))


def slots_within(room_bytes: int, rooms: tuple[ExpertRoom, ...]) -> tuple[int, ...]:
    """Return the most slots that fit, by size; those without which nothing runs have to."""
    low, high = 0, sum(room.n_experts for room in rooms)
    while low < high:
        middle = (low + high + 1) // 2
        if bytes_of_slots(split_slots(middle, rooms), rooms) <= room_bytes:
            low = middle
        else:
            high = middle - 1
    return split_slots(low, rooms)
