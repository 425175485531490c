"""A frozen residency keeps the hottest experts, or some of every layer."""

from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.policies.misses import LayerBook, PriceBook, parse_miss_policy
from moe_tool.runtime.residency import (
    cache_rooms,
    choose_resident_experts,
    frozen_rooms,
    n_slots_min,
)


def _manifest(loads: dict[int, list[float]] | None) -> Any:
    """Two layers of three experts, top-1; records in the order 2, 0, 1."""
    heat = None
    if loads is not None:
        heat = [SimpleNamespace(layer=layer, load=load) for layer, load in loads.items()]
    records = [SimpleNamespace(layer=layer, expert=e) for layer in (1, 3) for e in (2, 0, 1)]
    shape = SimpleNamespace(experts=3, layers=(1, 3), top_k=1)
    return SimpleNamespace(heat=heat, records=records, own_records=records, shape=shape)


def test_the_hottest_stay_whatever_their_layer() -> None:
    manifest = _manifest({1: [0.1, 0.8, 0.1], 3: [0.5, 0.2, 0.3]})
    assert n_slots_min(manifest) == 2
    assert choose_resident_experts(manifest, 5) == ((1, 1), (3, 0), (3, 2))


def test_without_heat_the_layers_take_turns_in_file_order() -> None:
    assert choose_resident_experts(_manifest(None), 5) == ((1, 2), (3, 2), (1, 0))


def test_with_room_for_all_nothing_is_left_free() -> None:
    assert len(choose_resident_experts(_manifest(None), 6)) == 6
    assert len(choose_resident_experts(_manifest(None), 2)) == 0


def _book_and_manifest(n_layers: int, n_experts: int, top_k: int, sizes: tuple[int, ...]) -> Any:
    rng = np.random.default_rng(n_layers * n_experts)
    layers = tuple(range(n_layers))
    none = np.zeros((n_experts, 0))
    book = PriceBook(
        layers={
            layer: LayerBook(
                nats=rng.uniform(0.1, 2, n_experts),
                eps=np.stack(
                    [np.full(n_experts, 0.0 if at == 0 else 0.1 * at) for at in range(len(sizes))]
                ),
                record_bytes=np.repeat([sizes], n_experts, axis=0).T,
                buddy=none.astype(np.int64),
                buddy_scale=none,
                buddy_eps=none,
            )
            for layer in layers
        },
    )
    use = [rng.dirichlet(np.ones(n_experts)) for _ in layers]
    manifest = SimpleNamespace(
        heat=[SimpleNamespace(layer=layer, load=use[layer].tolist()) for layer in layers],
        prices=[SimpleNamespace(layer=layer, use=use[layer].tolist()) for layer in layers],
        records=[
            SimpleNamespace(layer=layer, expert=e) for layer in layers for e in range(n_experts)
        ],
        replicas=[SimpleNamespace(record_size_bytes=size) for size in sizes[1:]],
        record_size_bytes=sizes[0],
        shape=SimpleNamespace(experts=n_experts, layers=layers, top_k=top_k),
    )
    return book, manifest


@settings(max_examples=60, deadline=None)
@given(
    n_layers=st.integers(1, 3),
    n_experts=st.integers(2, 6),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True),
    share=st.floats(0, 1),
    policy=st.sampled_from(["priced", "replica", "replica:part=0.9", "drop", "exact"]),
)
def test_all_forms_together_never_take_more_than_the_slots(
    n_layers: int, n_experts: int, sizes: list[int], share: float, policy: str
) -> None:
    top_k = min(2, n_experts)
    sizes_bytes = tuple(4096 * size for size in sorted(sizes, reverse=True))
    book, manifest = _book_and_manifest(n_layers, n_experts, top_k, sizes_bytes)
    free = n_slots_min(manifest)
    n_slots = max(free, int(share * n_layers * n_experts))
    choice = parse_miss_policy(policy)
    for rooms in (
        frozen_rooms(manifest, n_slots, choice, book),
        cache_rooms(manifest, n_slots, choice, pinned_share=0.0),
    ):
        taken = sum(room.n_slots * size for room, size in zip(rooms, sizes_bytes, strict=True))
        assert taken <= n_slots * sizes_bytes[0]
        held = [key for room in rooms for key in room.pinned]
        assert len(set(held)) == len(held)
        for level, room in enumerate(rooms):
            assert len(room.pinned) <= room.n_slots
            if room.pinned and n_slots < len(manifest.records):
                # what is read is read beside what stays
                needed = 0 if policy == "priced" else 1  # it reads no replica
                assert room.n_slots - len(room.pinned) >= (free if level == 0 else needed)
        assert rooms[0].n_slots >= min(free, n_slots)
