"""Which experts stay for a whole run: the hottest of the profile, or some of every layer."""

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.policies.hot_set import hottest_first, n_pinned


def choose_resident_experts(
    manifest: BundleManifest, n_slots: int, *, share: float = 1.0
) -> tuple[tuple[int, int], ...]:
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
    if manifest.heat is None:
        ranked = _in_turns(manifest)
    else:
        ranked = hottest_first({entry.layer: entry.load for entry in manifest.heat})
    count = n_pinned(
        share, n_slots=n_slots, n_slots_min=n_slots_min(manifest), n_experts=len(ranked)
    )
    return tuple(ranked[:count])


def n_slots_min(manifest: BundleManifest) -> int:
    """Return the slots that one token needs in one layer, and one to read ahead."""
    n_experts = manifest.shape.experts * len(manifest.shape.layers)
    return min(manifest.shape.top_k + 1, n_experts)


def _in_turns(manifest: BundleManifest) -> list[tuple[int, int]]:
    seen: dict[int, int] = {}
    turns: list[tuple[int, int, int]] = []
    for record in manifest.records:
        turn = seen.get(record.layer, 0)
        seen[record.layer] = turn + 1
        turns.append((turn, record.layer, record.expert))
    return [(layer, expert) for _, layer, expert in sorted(turns, key=lambda entry: entry[:2])]
