"""A frozen residency keeps the hottest experts, or some of every layer, within the slots' bytes."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_tool.budget.slots import bytes_of_slots, split_slots
from moe_tool.policies.eviction import parse_eviction
from moe_tool.policies.misses import LayerBook, PriceBook, parse_miss_policy
from moe_tool.runtime.residency import (
    cache_rooms,
    expert_rooms,
    frozen_rooms,
    hottest_rooms,
    n_slots_min,
)

Key = tuple[int, int]


def _table(size: int, keys: Sequence[Key]) -> Any:
    return SimpleNamespace(
        record_size_bytes=size,
        records=[SimpleNamespace(layer=layer, expert=expert) for layer, expert in keys],
        experts=frozenset(keys),
    )


def _manifest(loads: dict[int, list[float]] | None) -> Any:
    """Two layers of three experts, top-1; records in the order 2, 0, 1."""
    heat = None
    if loads is not None:
        heat = [SimpleNamespace(layer=layer, load=load) for layer, load in loads.items()]
    table = _table(4096, [(layer, e) for layer in (1, 3) for e in (2, 0, 1)])
    shape = SimpleNamespace(experts=3, layers=(1, 3), top_k=1)
    return SimpleNamespace(
        heat=heat, primaries=[table], cheaper=[], primary_records=table.records, shape=shape
    )


def _pinned(manifest: Any, n_slots: int) -> tuple[Key, ...]:
    (room,) = hottest_rooms(manifest, (n_slots,), share=1.0)
    return room.pinned


def test_the_hottest_stay_whatever_their_layer() -> None:
    manifest = _manifest({1: [0.1, 0.8, 0.1], 3: [0.5, 0.2, 0.3]})
    assert n_slots_min(manifest) == 2
    assert _pinned(manifest, 5) == ((1, 1), (3, 0), (3, 2))


def test_without_heat_the_layers_take_turns_in_file_order() -> None:
    assert _pinned(_manifest(None), 5) == ((1, 2), (3, 2), (1, 0))


def test_with_room_for_all_nothing_is_left_free() -> None:
    assert len(_pinned(_manifest(None), 6)) == 6
    assert len(_pinned(_manifest(None), 2)) == 0


@st.composite
def _bundles(draw: st.DrawFn) -> tuple[PriceBook, Any]:
    """Bundles of one or two primary widths, up to three cheaper forms and some removed experts."""
    n_layers, n_experts = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    keys = [(layer, e) for layer in range(n_layers) for e in range(n_experts)]
    n_primaries = draw(st.integers(1, 2))
    owner = {key: draw(st.integers(-1, n_primaries - 1)) for key in keys}
    tables = [[key for key in keys if owner[key] == at] for at in range(n_primaries)]
    assume(all(tables))
    sizes = [4096 * (7 - 2 * at) for at in range(n_primaries)]
    primaries = [_table(*each) for each in zip(sizes, tables, strict=True)]
    stored = [key for key in keys if owner[key] >= 0]
    cheaper = [
        _table(4096 * size, draw(st.lists(st.sampled_from(stored), unique=True, min_size=1)))
        for size in draw(st.lists(st.integers(1, 4), max_size=3, unique=True).map(sorted))[::-1]
    ]
    record_bytes = np.zeros((n_layers, 1 + len(cheaper), n_experts), dtype=np.int64)
    for form, table in [*((0, each) for each in primaries), *enumerate(cheaper, start=1)]:
        for layer, expert in table.experts:
            record_bytes[layer, form, expert] = table.record_size_bytes
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    none = np.zeros((n_experts, 0))
    book = PriceBook(
        layers={
            layer: LayerBook(
                nats=rng.uniform(0.1, 2, n_experts),
                eps=np.where(
                    record_bytes[layer] > 0, np.arange(1 + len(cheaper))[:, None] / 9, np.inf
                ),
                record_bytes=record_bytes[layer],
                buddy=none.astype(np.int64),
                buddy_scale=none,
                buddy_eps=none,
            )
            for layer in range(n_layers)
        },
    )
    use = [rng.dirichlet(np.ones(n_experts)) for _ in range(n_layers)]
    manifest = SimpleNamespace(
        heat=[SimpleNamespace(layer=at, load=row.tolist()) for at, row in enumerate(use)],
        prices=[SimpleNamespace(layer=at, use=row.tolist()) for at, row in enumerate(use)],
        resident_use=None,
        primaries=primaries,
        cheaper=cheaper,
        primary_records=[record for table in primaries for record in table.records],
        shape=SimpleNamespace(
            experts=n_experts, layers=tuple(range(n_layers)), top_k=min(2, n_experts)
        ),
    )
    return book, manifest


@settings(max_examples=150, deadline=None)
@given(
    bundle=_bundles(),
    share=st.floats(0, 1),
    policy=st.sampled_from(
        ["priced", "priced:nats-per-mb=0.1", "replica", "replica:part=0.9", "drop", "exact"]
    ),
)
def test_all_forms_together_never_take_more_than_the_slots(
    bundle: tuple[PriceBook, Any], share: float, policy: str
) -> None:
    book, manifest = bundle
    widths = expert_rooms(manifest)
    slots = split_slots(int(share * len(manifest.primary_records)), widths)
    choice = parse_miss_policy(policy)
    tables = [*manifest.primaries, *manifest.cheaper]
    for rooms in (
        frozen_rooms(manifest, slots, choice, book),
        cache_rooms(manifest, slots, choice, parse_eviction("lru")),
    ):
        found = list(zip(rooms, tables, strict=True))
        taken = sum(room.n_slots * table.record_size_bytes for room, table in found)
        assert taken <= bytes_of_slots(slots, widths)
        held = [key for room in rooms for key in room.pinned]
        assert len(set(held)) == len(held)
        for room, table in found:
            assert len(room.pinned) <= room.n_slots and set(room.pinned) <= table.experts
        for room, width in zip(rooms, widths, strict=False):
            # what is missing is read beside what stays
            n_free = room.n_slots - len(room.pinned)
            assert n_free >= min(width.n_slots_min, width.n_experts - len(room.pinned))
        if policy == "priced:nats-per-mb=0.1":  # cheaper forms may be read
            is_used = any(room.n_slots for room in rooms[len(widths) :])
            assert all(room.n_slots > len(room.pinned) for room in rooms[len(widths) :] if is_used)
