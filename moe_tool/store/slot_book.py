"""Assignment of experts to slots, without their bytes."""

from collections.abc import Collection, Sequence

import numpy as np

from moe_tool.artifacts.expert_ids import ExpertKey, LayerIds
from moe_tool.artifacts.form_table import FormTable
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.errors import BudgetError
from moe_tool.policies.eviction import Entry, ExpertCache, MakeEviction


class SlotBook:
    """Slots, numbered from 0, with the experts of an `ExpertCache`."""

    def __init__(
        self,
        shape: MoeShape,
        *,
        n_slots: int,
        pinned: Collection[ExpertKey],
        eviction: MakeEviction,
        per_layer: bool,
    ) -> None:
        """Begin with empty slots, of a number that `require_slots` accepts; see RecordStore."""
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
        self.hints = self._cache.hints
        self._pinned_masks = {
            layer: np.zeros((1, shape.experts), dtype=bool) for layer in shape.layers
        }
        for layer, expert in self.pinned:
            self._pinned_masks[layer][0, expert] = True
        self._masks = {layer: mask.copy() for layer, mask in self._pinned_masks.items()}
        self._free = list(range(n_slots - 1, -1, -1))

    def resident(self, layer: int) -> np.ndarray:
        """Return which experts of a layer have a slot or are pinned, [1, E] bool."""
        return self._masks[layer].copy()

    def pinned_mask(self, layer: int) -> np.ndarray:
        """Return which experts of a layer never leave, [1, E] bool."""
        return self._pinned_masks[layer].copy()

    def take(self, key: ExpertKey) -> int:
        """Assign a free slot to a pinned expert and return it."""
        slot = self._free.pop()
        self.slot_of[key] = slot
        return slot

    def begin_sequence(self) -> None:
        """Tell the eviction policy that a new sequence begins."""
        self._cache.begin_sequence()

    def access(
        self,
        layer: int,
        keys: Sequence[ExpertKey],
        scores: np.ndarray | None,
        elsewhere: Sequence[int] = (),
    ) -> list[Entry]:
        """Use the experts of a call and return those that are to `enter`; another form answers the
        experts of the layer in `elsewhere`."""
        heard = [self._ids.number((layer, expert)) for expert in elsewhere]
        self._cache.begin_call(self._ids.position[layer], scores, elsewhere=heard)
        return self._cache.access([self._ids.number(key) for key in keys])

    def prefetch(self, keys: Sequence[ExpertKey], held: Collection[ExpertKey]) -> list[Entry]:
        """Return the experts that are to `enter` as prefetches, as long as others than `held` can
        leave."""
        numbers = {self._ids.number(key) for key in held}
        return self._cache.prefetch([self._ids.number(key) for key in keys], numbers)

    def expect(self, keys: Sequence[ExpertKey], *, ahead: int) -> None:
        """Tell the eviction policy the prediction for the call `ahead` calls from now."""
        self._cache.expect([self._ids.number(key) for key in keys], ahead=ahead)

    def enter(self, entry: Entry) -> tuple[ExpertKey, int, ExpertKey | None]:
        """Return an entering expert, its slot, and the expert that leaves it; None: it was free."""
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
        """Remove an expert whose record was not read."""
        self._free.append(self.slot_of.pop(key))
        if key not in self.pinned:
            self._cache.discard(self._ids.number(key))
            self._masks[key[0]][0, key[1]] = False


def require_slots(
    shape: MoeShape, table: FormTable, *, n_slots: int, n_pinned: int, per_layer: bool
) -> None:
    """Refuse too few slots; only a primary table needs one that is not pinned.

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
