"""Stores of a session: pinned experts of each form, and slots for the rest."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.artifacts.precision import AnyPrecision
from moe_tool.budget.slots import split_slots
from moe_tool.errors import BudgetError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.policies.eviction import EvictionChoice
from moe_tool.policies.eviction.lru import Lru
from moe_tool.policies.eviction.protocol import CacheShape, Eviction
from moe_tool.runtime.memory_residency import Residency
from moe_tool.runtime.policy_choice import ChosenPolicy
from moe_tool.runtime.residency import (
    FormRoom,
    cache_rooms,
    expert_rooms,
    forms_read,
    frozen_rooms,
)
from moe_tool.store.channel_store import ChannelStore
from moe_tool.store.form_stores import FormStores
from moe_tool.store.protocol import ExpertStore
from moe_tool.store.reader import Read
from moe_tool.store.record_store import RecordStore
from moe_tool.store.throttle import ThrottledDisk

MakeStore = Callable[[BundleReader, tuple[FormRoom, ...], EvictionChoice], ExpertStore]
"""Function from a bundle, rooms in the order of `bundle.forms` and the eviction policy of primary
forms to a store with nothing read yet; the bundle stays open as long as the store"""


def choose_rooms(
    manifest: BundleManifest,
    slots: tuple[int, ...],
    residency: Residency,
    eviction: EvictionChoice,
    policy: ChosenPolicy,
) -> tuple[FormRoom, ...]:
    """Return each form's part of the memory, in the order of `manifest.forms`, for primary slots by
    table within the budget."""
    forms = forms_read(manifest, policy.choice, residency)

    def rooms_of(slots: tuple[int, ...]) -> tuple[FormRoom, ...]:
        if residency == "frozen":
            return frozen_rooms(manifest, slots, policy.choice, policy.prices)
        return cache_rooms(manifest, slots, policy.choice, eviction)

    def is_short(slots: tuple[int, ...], rooms: tuple[FormRoom, ...]) -> bool:
        cheaper = rooms[len(manifest.primaries) :]
        has_all = sum(slots) >= len(manifest.primary_records)
        return not has_all and any(not cheaper[form - 1].n_slots for form in forms)

    rooms = rooms_of(slots)
    if is_short(slots, rooms):
        pools = expert_rooms(manifest, per_layer=eviction.per_layer)
        n_experts = sum(pool.n_experts for pool in pools)
        shares = {percent: split_slots(percent * n_experts // 100, pools) for percent in range(101)}
        enough = next(p for p, tried in shares.items() if not is_short(tried, rooms_of(tried)))
        raise BudgetError(
            f"--policy {policy.name}: {sum(slots)} expert slots leave no room for cheaper forms "
            "beside what a token needs",
            hint=f"--memory {enough}%, or --policy exact",
        )
    return rooms


def staying_by_form(manifest: BundleManifest, rooms: tuple[FormRoom, ...]) -> dict[str, int]:
    """Return the number of pinned experts by the form's name, without forms that have none."""
    found: dict[str, int] = {}
    for table, room in zip(manifest.forms, rooms, strict=False):  # selectors have none
        if room.pinned:
            found[table.name] = found.get(table.name, 0) + len(room.pinned)
    return found


def stored_masks(manifest: BundleManifest) -> dict[int, torch.Tensor]:
    """Return decoder layer -> [E] bool, experts in the bundle; empty if it has all of them."""
    if not manifest.removed:
        return {}
    return {layer: torch.from_numpy(manifest.stored(layer)) for layer in manifest.shape.layers}


def open_stores(
    bundle: BundleReader,
    rooms: tuple[FormRoom, ...],
    eviction: EvictionChoice,
    disk: ThrottledDisk | None = None,
    time_reads: Callable[[Read], Read] | None = None,
) -> FormStores:
    """Return one store for each form that has room in memory; see `MakeStore`.

    Args:
        disk: the slow disk that all of them pretend to read from; None: the real one.
        time_reads: wraps reads of primary records to measure them; those of experts in channels,
            which are read in part, are not measured.
    """
    n_primaries = len(bundle.manifest.primaries)
    in_step = any(room.in_step for room in rooms)

    def read_of(form: int) -> Read:
        read: Read = partial(bundle.read_record_into, form=form)
        if disk is not None:
            read = disk.slow_down(read)
        return time_reads(read) if time_reads is not None and form < n_primaries else read

    shape = bundle.manifest.shape
    cheaper = _open_cheaper(bundle, rooms[n_primaries:], eviction, read_of, in_step=in_step)
    primaries: list[ExpertStore] = []
    primary_of: dict[int, list[int | None]] = {
        layer: [None] * shape.experts for layer in shape.layers
    }
    for held, room in zip(bundle.forms, rooms[:n_primaries], strict=False):
        if room.n_slots:
            for record in held.table.records:
                primary_of[record.layer][record.expert] = len(primaries)
            nested = held.table.precision.base
            base = None if nested is None else cheaper.get(nested)
            open_store: Callable[..., ExpertStore]
            if "selector" in held.table.precision.roles:
                open_store = partial(ChannelStore, disk=disk)
            else:
                open_store = partial(RecordStore, base=base, read=read_of(held.index))
            store = open_store(
                bundle,
                form=held.index,
                n_slots=room.n_slots,
                pinned=room.pinned,
                eviction=eviction.make,
                per_layer=eviction.per_layer,
            )
            primaries.append(store)
    return FormStores(
        primaries,
        [cheaper.get(table.precision) for table in bundle.manifest.cheaper],
        primary_of=primary_of,
        in_step=in_step,
    )


def _open_cheaper(
    bundle: BundleReader,
    rooms: tuple[FormRoom, ...],
    eviction: EvictionChoice,
    read_of: Callable[[int], Read],
    *,
    in_step: bool,
) -> dict[AnyPrecision, RecordStore]:
    """Return the stores of the cheaper forms that have room, by precision; `in_step` with the
    primary forms' cache they have its eviction policy, which then hears of all uses."""

    def make_cheaper(shape: CacheShape) -> Eviction:
        return eviction.make(replace(shape, is_cheaper=True))

    held_forms = bundle.forms[len(bundle.manifest.primaries) :]
    return {
        held.table.precision: RecordStore(
            bundle,
            form=held.index,
            n_slots=room.n_slots,
            pinned=room.pinned,
            eviction=make_cheaper if in_step else Lru,
            per_layer=in_step and eviction.per_layer,
            read=read_of(held.index),
        )
        for held, room in zip(held_forms, rooms, strict=False)
        if room.n_slots
    }
