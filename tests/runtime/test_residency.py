"""A frozen residency keeps the hottest experts, or some of every layer."""

from types import SimpleNamespace
from typing import Any

from moe_tool.runtime.residency import choose_resident_experts, n_slots_min


def _manifest(loads: dict[int, list[float]] | None) -> Any:
    """Two layers of three experts, top-1; records in the order 2, 0, 1."""
    heat = None
    if loads is not None:
        heat = [SimpleNamespace(layer=layer, load=load) for layer, load in loads.items()]
    records = [SimpleNamespace(layer=layer, expert=e) for layer in (1, 3) for e in (2, 0, 1)]
    shape = SimpleNamespace(experts=3, layers=(1, 3), top_k=1)
    return SimpleNamespace(heat=heat, records=records, shape=shape)


def test_the_hottest_stay_whatever_their_layer() -> None:
    manifest = _manifest({1: [0.1, 0.8, 0.1], 3: [0.5, 0.2, 0.3]})
    assert n_slots_min(manifest) == 2
    assert choose_resident_experts(manifest, 5) == ((1, 1), (3, 0), (3, 2))


def test_without_heat_the_layers_take_turns_in_file_order() -> None:
    assert choose_resident_experts(_manifest(None), 5) == ((1, 2), (3, 2), (1, 0))


def test_with_room_for_all_nothing_is_left_free() -> None:
    assert len(choose_resident_experts(_manifest(None), 6)) == 6
    assert len(choose_resident_experts(_manifest(None), 2)) == 0
