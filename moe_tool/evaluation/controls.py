"""Choice of the policies that one table compares."""

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.policies.misses import EXACT_POLICY, MISS_POLICIES, MissChoice, parse_miss_policy
from moe_tool.runtime.policy_choice import manifest_inputs


def policies_to_run(
    policy: MissChoice, manifest: BundleManifest, *, controls: bool
) -> dict[MissChoice, str]:
    """Return the policies of a table, `policy` among them, with their names there.

    Exact comes first: it shows the bytes that the same residency reads without lossy answers. Then
    come the policy's own controls, or else all policies marked as controls: random and drop are
    baselines for any choice of stand-in, next-ranked is one that needs no buddy map.

    Args:
        policy: the requested policy.
        manifest: the bundle's manifest.
        controls: whether to add controls.
    """
    if not controls:
        return {policy: policy.name}
    own = policy.spec.controls
    found = None if own is None else own(policy.values, manifest_inputs(manifest))
    if found is None:
        found = tuple(name for name, spec in MISS_POLICIES.items() if spec.in_controls)
    named = {each: each.name for each in (EXACT_POLICY, policy)}
    return named | {parse_miss_policy(name): name for name in found}
