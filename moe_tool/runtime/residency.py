"""Choice of the pinned experts of a run and their forms: the hottest of the profile, some of every
layer, or those that make misses cheapest."""

import math
from collections import Counter
from dataclasses import dataclass, replace

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.artifacts.expert_ids import ExpertKey
from moe_tool.budget.slots import (
    ExpertRoom,
    bytes_of_slots,
    min_slots,
    slots_beside,
)
from moe_tool.policies.cheapest_residents import cheapest_residents
from moe_tool.policies.eviction import EvictionChoice
from moe_tool.policies.hot_set import hottest_first, n_pinned
from moe_tool.policies.misses import MissChoice, PriceBook
from moe_tool.policies.misses.priced import worth_of_reads
from moe_tool.runtime.memory_residency import Residency
from moe_tool.runtime.price_list import resident_use

_BOTH_FORMS = ("two-precisions", "beside-replicas")


@dataclass(frozen=True, slots=True, kw_only=True)
class FormRoom:
    """One form's part of the memory."""

    n_slots: int
    pinned: tuple[ExpertKey, ...]
    """Pinned experts, (layer, expert)"""
    in_step: bool = False
    """Whether a cheaper form's slots follow the run's eviction policy, as the primary ones do, and
    not LRU among the calls that name the form"""


def frozen_rooms(
    manifest: BundleManifest, slots: tuple[int, ...], choice: MissChoice, prices: PriceBook | None
) -> tuple[FormRoom, ...]:
    """Return each form's room under frozen residency, primary tables first, then cheaper forms.

    `slots` are the primary records that fit the budget, by table; cheaper forms share their bytes.
    """
    hottest = hottest_rooms(manifest, slots, share=1.0)
    if _has_everything(manifest, slots) or choice.spec.residents == "hottest":
        return hottest
    if choice.spec.residents in _BOTH_FORMS:
        return _two_precisions(manifest, slots, choice) or hottest
    return _cheapest(manifest, slots, choice, prices) or hottest


def cache_rooms(
    manifest: BundleManifest, slots: tuple[int, ...], choice: MissChoice, eviction: EvictionChoice
) -> tuple[FormRoom, ...]:
    """Return each form's room under cache residency, see `frozen_rooms`.

    Replicas that a policy answers with and never reads stay in memory.
    """
    rooms, n_primaries = None, len(manifest.primaries)
    if choice.spec.residents == "cheapest" and _has_everything(manifest, slots):
        return hottest_rooms(manifest, slots, share=1.0)
    if not _has_everything(manifest, slots):
        if choice.spec.residents == "beside-replicas":
            both = _two_precisions(manifest, slots, choice)
            if both is not None:
                whole = (replace(room, pinned=()) for room in both[:n_primaries])
                return (*whole, *both[n_primaries:])
        elif choice.spec.residents == "two-precisions":
            n_least = len(manifest.shape.layers) if eviction.per_layer else 0
            rooms = _two_precisions(manifest, slots, choice, n_least=n_least)
            if rooms is not None:
                cheaper = (replace(room, in_step=True) for room in rooms[n_primaries:])
                rooms = (*rooms[:n_primaries], *cheaper)
    if rooms is None:
        share, per_layer = eviction.spec.pinned_share, eviction.per_layer
        return hottest_rooms(manifest, slots, share=share, per_layer=per_layer)
    return tuple(replace(room, pinned=()) for room in rooms)


def forms_read(
    manifest: BundleManifest, choice: MissChoice, residency: Residency
) -> tuple[int, ...]:
    """Return the cheaper forms that may answer a miss, as rows after PRIMARY.

    In a cache `priced` holds primary forms alone: on text of another kind than the profile's a
    cheaper form costs five to ten times its price, and a re-routed slot about its own.
    """
    if choice.spec.residents in _BOTH_FORMS:
        return (int(choice.values["form"]),)
    values = choice.values
    if choice.spec.residents == "cheapest" and residency == "frozen":
        reads = not math.isinf(min(values["nats-per-mb"], values["kl"]))
        return tuple(range(1, 1 + len(manifest.cheaper))) if reads else ()
    return ()


def hottest_rooms(
    manifest: BundleManifest, slots: tuple[int, ...], *, share: float, per_layer: bool = False
) -> tuple[FormRoom, ...]:
    """Return rooms with the most used experts pinned in their primary form, and no cheaper form.

    Slots for one token's experts stay free for fetches, unless everything fits. Without heat in the
    manifest the layers take turns, each in file order. `share` is the largest share of the slots
    for pinned experts.
    """
    ranked = _ranked(manifest) if share else []
    rooms = []
    rooms_of = expert_rooms(manifest, per_layer=per_layer)
    for n_slots, table, room in zip(slots, manifest.primaries, rooms_of, strict=True):
        members = table.experts
        count = n_pinned(
            share, n_slots=n_slots, n_slots_min=room.n_slots_min, n_experts=room.n_experts
        )
        pinned = [key for key in ranked if key in members][:count]
        rooms.append(FormRoom(n_slots=n_slots, pinned=tuple(pinned)))
    return (*rooms, *(FormRoom(n_slots=0, pinned=()) for _ in manifest.cheaper))


def expert_rooms(manifest: BundleManifest, *, per_layer: bool = False) -> tuple[ExpertRoom, ...]:
    """Return record size and number of experts by primary table, for a memory plan; with
    `per_layer` every layer needs a slot at least."""
    n_layers = len(manifest.shape.layers) if per_layer else 0
    return tuple(
        ExpertRoom(
            record_bytes=table.record_size_bytes,
            n_experts=len(table.records),
            n_slots_min=max(
                min_slots(manifest.shape.top_k, len(table.records)),
                min(n_layers, len(table.records)),
            ),
        )
        for table in manifest.primaries
    )


def n_slots_min(manifest: BundleManifest) -> int:
    """Return the slots for one token's experts in a layer, and one for a prefetch."""
    return min_slots(manifest.shape.top_k, len(manifest.primary_records))


def _has_everything(manifest: BundleManifest, slots: tuple[int, ...]) -> bool:
    tables = zip(slots, manifest.primaries, strict=True)
    return all(n_slots >= len(table.records) for n_slots, table in tables)


def _cheapest(
    manifest: BundleManifest, slots: tuple[int, ...], choice: MissChoice, book: PriceBook | None
) -> tuple[FormRoom, ...] | None:
    """Return the rooms that make misses cheapest; None without prices, or if nothing fits.

    Slots for one token of every primary size stay free, and one slot of every cheaper form that may
    be read.
    """
    use = resident_use(manifest)
    if book is None or use is None:
        return None
    shape = manifest.shape
    nats_per_mb = worth_of_reads(choice.values, book, n_slots=shape.top_k * len(shape.layers))
    n_read = 1 if forms_read(manifest, choice, "frozen") else 0
    rooms = expert_rooms(manifest)
    free = bytes_of_slots(tuple(room.n_slots_min for room in rooms), rooms)
    free += n_read * sum(table.record_size_bytes for table in manifest.cheaper)
    room_bytes = bytes_of_slots(slots, rooms) - free
    if room_bytes <= 0:
        return None
    chosen = cheapest_residents(book, use, room_bytes=room_bytes, nats_per_mb=nats_per_mb)
    primary, *cheaper = chosen.by_form
    found = []
    for table, room in zip(manifest.primaries, rooms, strict=True):
        members = table.experts
        held = tuple(key for key in primary if key in members)
        n_slots = min(len(held) + room.n_slots_min, room.n_experts)
        found.append(FormRoom(n_slots=n_slots, pinned=held))
    return (*found, *(FormRoom(n_slots=len(keys) + n_read, pinned=keys) for keys in cheaper))


def _two_precisions(
    manifest: BundleManifest, slots: tuple[int, ...], choice: MissChoice, *, n_least: int = 0
) -> tuple[FormRoom, ...] | None:
    """Return rooms of the hottest experts in their primary form and the next hottest in a cheaper
    one, of at least `n_least` slots; None if there is no such form or no room."""
    form, is_read = int(choice.values["form"]), choice.spec.residents == "two-precisions"
    if form > len(manifest.cheaper):
        return None
    low, rooms = manifest.cheaper[form - 1], expert_rooms(manifest)
    free = max(n_least, n_slots_min(manifest))
    shared = slots_beside(
        bytes_of_slots(slots, rooms),
        rooms,
        low.record_size_bytes,
        part=choice.values["part"],
        n_least=free,
    )
    if shared is None:
        return None
    high_slots, n_low = shared
    found = list(hottest_rooms(manifest, high_slots, share=1.0))
    high = {key for room in found for key in room.pinned}
    stored = low.experts
    following = [key for key in _ranked(manifest) if key in stored and key not in high]
    at = len(manifest.primaries) + form - 1
    n_pinned_low = max(0, n_low - free) if is_read else n_low
    found[at] = FormRoom(n_slots=n_low, pinned=tuple(following[:n_pinned_low]))
    return tuple(found)


def _ranked(manifest: BundleManifest) -> list[ExpertKey]:
    """Return the most used experts first; without heat the layers take turns."""
    if manifest.heat is not None:
        return hottest_first({entry.layer: entry.load for entry in manifest.heat})
    seen: Counter[int] = Counter()
    turns: dict[ExpertKey, tuple[int, int]] = {}
    for record in manifest.primary_records:
        turns[record.layer, record.expert] = (seen[record.layer], record.layer)
        seen[record.layer] += 1
    return sorted(turns, key=turns.__getitem__)
