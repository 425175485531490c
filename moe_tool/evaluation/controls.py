"""Which policies one table compares."""

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.policies.misses import parse_miss_policy

CONTROLS = ("exact", "priced", "replica", "near-tie", "buddy", "next-ranked", "random", "drop")


def policies_to_run(policy: str, manifest: BundleManifest, *, controls: bool) -> tuple[str, ...]:
    """Return the policies of a table, `policy` among them, each once.

    Exact comes first: it shows what the same residency costs in bytes when nothing is answered by
    something else. Random and drop are what a choice of stand-in has to beat, next-ranked what it
    has to beat to be worth its map.

    Pruning leaves out what is in memory too: its controls leave out as many experts by the ratio of
    their gate weights, and at random.

    Args:
        policy: the one that was asked for.
        manifest: of the bundle.
        controls: whether its controls run too.
    """
    if not controls:
        return (policy,)
    learned = manifest.pruning
    choice = parse_miss_policy(policy)
    if choice.kind == "prune:learned" and learned is not None:
        rate = choice.values["rate"] if choice.values["rate"] >= 0 else learned.rate
        top_k = manifest.shape.top_k
        share = min(1.0, rate * top_k / (top_k - 1))
        return ("exact", policy, f"prune:share={share:.6g}", f"prune:random:rate={rate:.6g}")
    return tuple(dict.fromkeys(("exact", policy, *CONTROLS)))
