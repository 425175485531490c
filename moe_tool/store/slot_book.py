"""Which expert lies in which slot: the content of a store, with no byte of an expert in it."""

from collections.abc import Collection, Sequence

import numpy as np

from moe_tool.artifacts.expert_ids import ExpertKey, LayerIds
from moe_tool.artifacts.form_table import FormTable
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.errors import BudgetError
from moe_tool.policies.eviction import Entry, ExpertCache, MakeEviction
from moe_tool.policies.eviction.protocol import Hint


class SlotBook:
    """Slots, numbered from 0, with their experts, by an `ExpertCache`."""

    def __init__(
        self,
        shape: MoeShape,
        *,
        n_slots: int,
        pinned: Collection[ExpertKey],
        eviction: MakeEviction,
        per_layer: bool,
    ) -> None:
        """Begin with empty slots.

        Args:
            shape: of the model.
            n_slots: pinned experts included; `require_slots` was asked.
            pinned: experts that never leave.
            eviction: makes the policy of what is not pinned.
            per_layer: every layer has its own equal part of the slots that are not pinned.
        """
        self.pinned = frozenset(pinned)
        self.slot_of: dict[ExpertKey, int] = {}
        self._ids = LayerIds(shape.layers, shape.experts)
        self._cache = ExpertCache(
            eviction,
            n_layers=len(shape.layers),
            n_experts=shape.experts,
            capacity=n_slots - len(self.pinned),
            per_layer=per_layer,
            pinned=[self._ids.number(key) for key in self.pinned],
        )
        self._pinned_masks = {
            layer: np.zeros((1, shape.experts), dtype=bool) for layer in shape.layers
        }
        for layer, expert in self.pinned:
            self._pinned_masks[layer][0, expert] = True
        self._masks = {layer: mask.copy() for layer, mask in self._pinned_masks.items()}
        self._free = list(range(n_slots - 1, -1, -1))

    @property
    def hints(self) -> frozenset[Hint]:
        """Hints that the eviction policy asks for beside the accesses"""
        return self._cache.hints

    def resident(self, layer: int) -> np.ndarray:
        """Return which experts of a layer have a slot or are pinned, [1, E] bool."""
        return self._masks[layer].copy()

    def pinned_mask(self, layer: int) -> np.ndarray:
        """Return which experts of a layer never leave, [1, E] bool."""
        return self._pinned_masks[layer].copy()

    def take(self, key: ExpertKey) -> int:
        """Return a free slot for a pinned expert, which has it from now on."""
        slot = self._free.pop()
        self.slot_of[key] = slot
        return slot

    def access(
        self, layer: int, keys: Sequence[ExpertKey], scores: np.ndarray | None
    ) -> list[Entry]:
        """Use the experts that a call names; return those that are to `enter`."""
        self._cache.begin_call(self._ids.position[layer], scores)
        return self._cache.access([self._ids.number(key) for key in keys])

    def prefetch(self, keys: Sequence[ExpertKey], held: Collection[ExpertKey]) -> list[Entry]:
        """Return those of the experts that are to `enter` before they are named, as long as others
        than `held` can leave."""
        numbers = {self._ids.number(key) for key in held}
        return self._cache.prefetch([self._ids.number(key) for key in keys], numbers)

    def expect(self, keys: Sequence[ExpertKey], *, ahead: int) -> None:
        """Tell the eviction policy what the call `ahead` calls from now is predicted to name."""
        self._cache.expect([self._ids.number(key) for key in keys], ahead=ahead)

    def enter(self, entry: Entry) -> tuple[ExpertKey, int, ExpertKey | None]:
        """Return an expert that enters, its slot, and who leaves it, None where it was free."""
        key, victim = self._ids.key(entry.key), None
        if entry.victim is None:
            slot = self._free.pop()
        else:
            victim = self._ids.key(entry.victim)
            slot = self.slot_of.pop(victim)
            self._masks[victim[0]][0, victim[1]] = False
        self.slot_of[key] = slot
        self._masks[key[0]][0, key[1]] = True
        return key, slot, victim

    def strike_out(self, key: ExpertKey) -> None:
        """Forget an expert whose record did not come."""
        self._free.append(self.slot_of.pop(key))
        if key not in self.pinned:
            self._cache.discard(self._ids.number(key))
            self._masks[key[0]][0, key[1]] = False


def require_slots(
    shape: MoeShape, table: FormTable, *, n_slots: int, n_pinned: int, per_layer: bool
) -> None:
    """Refuse slots that cannot serve.

    Args:
        shape: of the model.
        table: records that the slots are for; of forms that are not primary none need ever be read.
        n_slots: that were asked for.
        n_pinned: experts that never leave.
        per_layer: every layer has its own equal part of the slots that are not pinned.

    Raises:
        BudgetError: the slots cannot hold the pinned experts and one more, or one per layer.
    """
    n_all, n_read = len(table.records), 1 if table.role == "primary" else 0
    if n_slots < min(n_pinned + n_read, n_all) or n_slots < 1:
        raise BudgetError(
            f"{n_slots} expert slots cannot hold {n_pinned} pinned ones and one more",
            hint="give more --memory",
        )
    capacity = min(n_slots, n_all) - n_pinned
    if per_layer and 0 < capacity < len(shape.layers):
        raise BudgetError(
            f"{capacity} expert slots are not one for each of {len(shape.layers)} layers",
            hint="give more --memory, or leave per-layer out of --eviction",
        )
