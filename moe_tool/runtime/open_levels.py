"""The stores of a session: who is in memory in which form, and slots for the others."""

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.artifacts.routing import PRIMARY
from moe_tool.errors import BudgetError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.policies.eviction import EvictionChoice
from moe_tool.policies.eviction.lru import Lru
from moe_tool.runtime.moe_layer import Residency
from moe_tool.runtime.policy_choice import ChosenPolicy
from moe_tool.runtime.residency import LevelRoom, cache_rooms, frozen_rooms, mixed_rooms
from moe_tool.store.channel_store import ChannelStore
from moe_tool.store.expert_levels import ExpertLevels
from moe_tool.store.expert_store import ExpertStore
from moe_tool.store.mixed_store import MixedStore

_N_READERS = 2


def choose_rooms(
    manifest: BundleManifest,
    slots: tuple[int, ...],
    residency: Residency,
    eviction: EvictionChoice,
    policy: ChosenPolicy,
) -> tuple[LevelRoom, ...]:
    """Return what each form of experts gets of the memory, by level.

    Args:
        manifest: of the bundle.
        slots: that the budget has for the experts' own records, by size.
        residency: whether what is in memory changes.
        eviction: of full experts.
        policy: what answers misses.
    """
    n_slots = sum(slots)
    if len(slots) > 1:
        share = 1.0 if residency == "frozen" else eviction.pinned_share
        return mixed_rooms(manifest, slots, pinned_share=share)
    if residency == "frozen":
        rooms = frozen_rooms(manifest, n_slots, policy.choice, policy.prices)
    else:
        rooms = cache_rooms(manifest, n_slots, policy.choice, pinned_share=eviction.pinned_share)
    if policy.choice.residents == "two-precisions" and n_slots < len(manifest.records):
        _require_cheaper_form(rooms, policy)
    return rooms


def _require_cheaper_form(rooms: tuple[LevelRoom, ...], policy: ChosenPolicy) -> None:
    """Refuse a budget that leaves a policy nothing of the form that it names."""
    if not rooms[int(policy.choice.values["level"])].n_slots:
        raise BudgetError(
            f"--policy {policy.name}: {rooms[PRIMARY].n_slots} expert slots leave no room for "
            "cheaper forms beside what a token needs",
            hint="more --memory, e.g. 20%, or --policy exact",
        )


def staying_by_form(manifest: BundleManifest, rooms: tuple[LevelRoom, ...]) -> dict[str, int]:
    """Return how many experts never leave memory, by form, as `--replicas` names it; forms of which
    none stays are left out."""
    forms = (
        manifest.precision,
        *(table.precision for table in manifest.replicas),
        *(table.precision for table in manifest.others),
    )
    return {
        form.name: len(room.pinned)
        for form, room in zip(forms, rooms, strict=True)
        if room.pinned
    }


def open_levels(
    bundle: BundleReader, rooms: tuple[LevelRoom, ...], eviction: EvictionChoice
) -> ExpertLevels:
    """Return one store for each form of which there is to be anything in memory.

    Args:
        bundle: stays open as long as the stores.
        rooms: by level of the bundle.
        eviction: of the experts' own forms.
    """
    if bundle.chooser_level is not None:
        (room,) = rooms
        channels = ChannelStore(
            bundle,
            n_slots=room.n_slots,
            pinned=room.pinned,
            eviction=eviction.make,
            per_layer=eviction.per_layer,
            n_readers=_N_READERS,
        )
        return ExpertLevels([channels], n_experts=bundle.manifest.shape.experts)
    own = set(bundle.own_levels)
    bases = [at for at, table in enumerate(bundle.manifest.replicas, start=1) if table.is_base]
    stores: list[ExpertStore | None] = [None] * len(rooms)
    for level, room in reversed(list(enumerate(rooms))):  # a base before the experts over it
        if room.n_slots:
            stores[level] = ExpertStore(
                bundle,
                level=level,
                n_slots=room.n_slots,
                pinned=room.pinned,
                eviction=eviction.make if level in own else Lru,
                per_layer=eviction.per_layer and level in own,
                n_readers=_N_READERS,
                base=stores[bases[0]] if bases and level == PRIMARY else None,
            )
    shape = bundle.manifest.shape
    if len(own) == 1:
        return ExpertLevels(stores, n_experts=shape.experts)
    mixed = [stores[level] for level in bundle.own_levels]
    store_of: dict[int, list[int | None]] = {}
    for layer in shape.layers:
        store_of[layer] = [None] * shape.experts
    for at, level in enumerate(bundle.own_levels):
        for record in bundle.levels[level].records:
            store_of[record.layer][record.expert] = at
    held = MixedStore([store for store in mixed if store is not None], store_of)
    return ExpertLevels([held], n_experts=shape.experts)
