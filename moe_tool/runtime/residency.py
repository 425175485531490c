"""Which experts stay for a whole run, and in which form: the hottest of the profile, some of every
layer, or what makes misses cheapest."""

import math
from dataclasses import dataclass

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.artifacts.routing import FULL
from moe_tool.budget.slots import ExpertRoom, min_slots
from moe_tool.policies.cheapest_residents import cheapest_residents, free_for_residents
from moe_tool.policies.hot_set import ExpertKey, hottest_first, n_pinned
from moe_tool.policies.misses import MissChoice, PriceBook
from moe_tool.runtime.price_list import expert_use


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelRoom:
    """One level's part of the memory."""

    n_slots: int
    pinned: tuple[ExpertKey, ...]


def frozen_rooms(
    manifest: BundleManifest, n_slots: int, choice: MissChoice, prices: PriceBook | None
) -> tuple[LevelRoom, ...]:
    """Return who is in memory for a whole run under a policy, by level.

    Args:
        manifest: of the bundle.
        n_slots: that the budget has for records of full experts; cheaper forms share their bytes.
        choice: of the policy.
        prices: of the manifest.
    """
    full = (LevelRoom(n_slots=n_slots, pinned=choose_resident_experts(manifest, n_slots)),)
    nothing = LevelRoom(n_slots=0, pinned=())
    n_levels = 1 + len(manifest.replicas)
    if n_slots >= len(manifest.records) or choice.residents == "hottest":
        return full + (nothing,) * (n_levels - 1)
    if choice.residents == "two-precisions":
        return _two_precisions(manifest, n_slots, choice)
    nats_per_mb = choice.values.get("nats-per-mb", math.inf)
    return _cheapest(manifest, n_slots, prices, nats_per_mb) or full + (nothing,) * (n_levels - 1)


def cache_rooms(
    manifest: BundleManifest, n_slots: int, choice: MissChoice, *, pinned_share: float
) -> tuple[LevelRoom, ...]:
    """Return each level's slots where what is in memory changes, see `frozen_rooms`."""
    nothing = LevelRoom(n_slots=0, pinned=())
    if choice.residents == "two-precisions" and n_slots < len(manifest.records):
        rooms = _two_precisions(manifest, n_slots, choice)
        return tuple(LevelRoom(n_slots=room.n_slots, pinned=()) for room in rooms)
    pinned: tuple[ExpertKey, ...] = ()
    if pinned_share:
        pinned = choose_resident_experts(manifest, n_slots, share=pinned_share)
    return (LevelRoom(n_slots=n_slots, pinned=pinned),) + (nothing,) * len(manifest.replicas)


def mixed_rooms(
    manifest: BundleManifest, slots: tuple[int, ...], *, pinned_share: float
) -> tuple[LevelRoom, ...]:
    """Return the slots of each of the forms that experts have of their own, see `frozen_rooms`.

    Args:
        manifest: of a bundle of experts of several widths.
        slots: by own form.
        pinned_share: part of the slots that experts may have for the whole run.
    """
    ranked = _ranked(manifest)
    tables = (manifest.records, *(table.records for table in manifest.others))
    rooms = []
    for n_slots, records, room in zip(slots, tables, expert_rooms(manifest), strict=True):
        members = {(record.layer, record.expert) for record in records}
        count = n_pinned(
            pinned_share,
            n_slots=n_slots,
            n_slots_min=room.n_slots_min,
            n_experts=len(members),
        )
        pinned = [key for key in ranked if key in members][:count] if pinned_share else []
        rooms.append(LevelRoom(n_slots=n_slots, pinned=tuple(pinned)))
    return tuple(rooms)


def expert_rooms(manifest: BundleManifest) -> tuple[ExpertRoom, ...]:
    """Return what slots cost, by the forms that experts have of their own."""
    sizes = [(manifest.record_size_bytes, len(manifest.records))]
    sizes += [(table.record_size_bytes, len(table.records)) for table in manifest.others]
    return tuple(
        ExpertRoom(
            record_bytes=size,
            n_experts=count,
            n_slots_min=min_slots(manifest.shape.top_k, count),
        )
        for size, count in sizes
    )


def choose_resident_experts(
    manifest: BundleManifest, n_slots: int, *, share: float = 1.0
) -> tuple[ExpertKey, ...]:
    """Return the (layer, expert) pairs that stay in memory for a whole run.

    The slots of one token's experts are left free, so that what is not resident can be fetched.
    With room for everything nothing is left free. Without heat in the manifest the layers take
    turns, each in file order.

    Args:
        manifest: of the bundle.
        n_slots: slots of the pool.
        share: part of the slots that they may take.

    Returns:
        At most `n_slots` pairs, hottest first.
    """
    ranked = _ranked(manifest)
    count = n_pinned(
        share, n_slots=n_slots, n_slots_min=n_slots_min(manifest), n_experts=len(ranked)
    )
    return tuple(ranked[:count])


def n_slots_min(manifest: BundleManifest) -> int:
    """Return the slots that one token needs in one layer, and one to read ahead."""
    n_experts = manifest.shape.experts * len(manifest.shape.layers)
    return min_slots(manifest.shape.top_k, n_experts)


def _cheapest(
    manifest: BundleManifest, n_slots: int, book: PriceBook | None, nats_per_mb: float
) -> tuple[LevelRoom, ...] | None:
    """One token's slots of full experts stay free, and one slot of every cheaper form that may be
    read."""
    use = expert_use(manifest)
    if book is None or use is None:
        return None
    free = n_slots_min(manifest)
    room = free_for_residents(n_slots, free, book.record_bytes, nats_per_mb=nats_per_mb)
    if room <= 0:
        return None
    chosen = cheapest_residents(book, use, room_bytes=room, nats_per_mb=nats_per_mb)
    full, *cheaper = chosen.by_level
    n_read = 0 if math.isinf(nats_per_mb) else 1
    return (
        LevelRoom(n_slots=len(full) + free, pinned=full),
        *(LevelRoom(n_slots=len(keys) + n_read, pinned=keys) for keys in cheaper),
    )


def _two_precisions(
    manifest: BundleManifest, n_slots: int, choice: MissChoice
) -> tuple[LevelRoom, ...]:
    """The hottest experts in full, and in a part of the memory those that follow in a cheaper
    form."""
    level = int(choice.values["level"])
    free = n_slots_min(manifest)
    rooms = [LevelRoom(n_slots=n_slots, pinned=choose_resident_experts(manifest, n_slots))]
    rooms += [LevelRoom(n_slots=0, pinned=()) for _ in manifest.replicas]
    if level > len(manifest.replicas):
        return tuple(rooms)
    low_bytes = manifest.replicas[level - 1].record_size_bytes
    part = int(choice.values["part"] * n_slots * manifest.record_size_bytes)
    n_low = max(free, part // low_bytes)
    taken = -(-n_low * low_bytes // manifest.record_size_bytes)
    n_high = n_slots - taken
    if n_high < free:
        return tuple(rooms)
    high = choose_resident_experts(manifest, n_high)
    following = [key for key in _ranked(manifest) if key not in set(high)]
    low = tuple(following[: max(0, n_low - free)])
    rooms[FULL] = LevelRoom(n_slots=n_high, pinned=high)
    rooms[level] = LevelRoom(n_slots=n_low, pinned=low)
    return tuple(rooms)


def _ranked(manifest: BundleManifest) -> list[ExpertKey]:
    if manifest.heat is None:
        return _in_turns(manifest)
    return hottest_first({entry.layer: entry.load for entry in manifest.heat})


def _in_turns(manifest: BundleManifest) -> list[ExpertKey]:
    seen: dict[int, int] = {}
    turns: list[tuple[int, int, int]] = []
    for record in manifest.own_records:
        turn = seen.get(record.layer, 0)
        seen[record.layer] = turn + 1
        turns.append((turn, record.layer, record.expert))
    return [(layer, expert) for _, layer, expert in sorted(turns, key=lambda entry: entry[:2])]
