"""Which policies one table compares."""

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.policies.misses import MISS_POLICIES, parse_miss_policy
from moe_tool.runtime.policy_choice import manifest_inputs


def policies_to_run(policy: str, manifest: BundleManifest, *, controls: bool) -> tuple[str, ...]:
    """Return the policies of a table, `policy` among them, each once.

    Exact comes first: it shows what the same residency costs in bytes when nothing is answered by
    something else. Then, unless a policy names controls of its own, come all that answer misses:
    random and drop are what a choice of stand-in has to beat, next-ranked what it has to beat to
    be worth its map.

    Args:
        policy: the one that was asked for.
        manifest: of the bundle.
        controls: whether its controls run too.
    """
    if not controls:
        return (policy,)
    choice = parse_miss_policy(policy)
    own = choice.spec.controls
    found = None if own is None else own(choice.values, manifest_inputs(manifest))
    if found is None:
        found = tuple(name for name, spec in MISS_POLICIES.items() if spec.in_controls)
    return tuple(dict.fromkeys(("exact", policy, *found)))
