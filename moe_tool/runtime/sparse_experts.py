"""Checks and notes for contextual sparsity in a session (FloE, arXiv:2505.05950)."""

from moe_tool.errors import UsageError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.policies.misses import EXACT_POLICY, MissChoice
from moe_tool.policies.prefetch import NO_PREFETCH
from moe_tool.quantization.channels import GRID
from moe_tool.runtime.run_options import RunOptions


def require_sparse(options: RunOptions, policy: MissChoice, bundle: BundleReader) -> None:
    """Refuse options that exclude sparse experts, or a bundle without channels.

    Raises:
        UsageError: the hint names settings that work.
    """
    sparsity = options.sparse_experts
    if bundle.manifest.selectors and options.record_trace:
        raise UsageError(
            "--record-trace: the experts of this bundle are in channels, which a trace does not "
            "know",
            hint="record it with a bundle of one number of --bits: the routing is the same",
        )
    if sparsity is None:
        return
    name = f"--sparse-experts {sparsity:g}"
    if not 0 <= sparsity <= GRID[-1]:
        raise UsageError(f"{name}: 0 to {GRID[-1]:g} is possible", hint="--sparse-experts 0.7")
    if not bundle.manifest.selectors:
        raise UsageError(
            f"{name}: the experts of {bundle.folder} are not in channels",
            hint="moe-tool pack --sparse-experts gate2",
        )
    require_exact(sparsity, policy)
    if options.batch > 1:
        raise UsageError(
            f"{name} works with one sequence at a time, not {options.batch}",
            hint="leave it out: several sequences want most channels between them",
        )
    if options.prefetch not in (None, NO_PREFETCH):
        raise UsageError(
            f"{name} beside --prefetch {options.prefetch}: whole experts would be read ahead",
            hint="--prefetch none",
        )


def require_exact(sparsity: float, policy: MissChoice) -> None:
    """Refuse a lossy policy with channels left out.

    Raises:
        UsageError: the policy is lossy.
    """
    if policy != EXACT_POLICY:
        raise UsageError(
            f"--sparse-experts {sparsity:g} cannot be combined with --policy {policy.name}",
            hint="--policy exact",
        )


def describe_sparse(sparsity: float) -> str:
    """Return the note on sparse experts before the first token."""
    if sparsity == 0:
        return "sparse experts: no channel is left out; a miss is read channel by channel"
    return (
        f"sparse experts: about {sparsity:.0%} of an expert's channels are left out of every "
        "decoded token, which changes the text; prompts are computed in full"
    )
