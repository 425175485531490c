"""Policies named in files: only existing ones, with valid parameters."""

from pathlib import Path

from moe_tool.artifacts.pack_plan import PackPlan
from moe_tool.artifacts.precision import replica_precisions
from moe_tool.errors import CorruptArtifactError, UsageError
from moe_tool.formats.json_artifact import read_json_artifact
from moe_tool.policies.eviction import EvictionChoice, parse_eviction
from moe_tool.policies.misses import MissChoice, parse_miss_policy
from moe_tool.quantizers.registry import QUANTIZERS


def named_eviction(path: Path, name: str, *, remedy: str) -> EvictionChoice:
    """Return the eviction policy that a file names.

    Raises:
        CorruptArtifactError: no such policy exists; the file is at fault, not the user.
    """
    try:
        return parse_eviction(name)
    except UsageError as error:
        raise CorruptArtifactError(
            f"{path} names an unknown eviction policy", hint=remedy
        ) from error


def named_miss_policy(path: Path, name: str, *, remedy: str) -> MissChoice:
    """Return the miss policy that a file names; errors as in `named_eviction`."""
    try:
        return parse_miss_policy(name)
    except UsageError as error:
        raise CorruptArtifactError(f"{path} names an unknown miss policy", hint=remedy) from error


def read_plan(path: Path) -> PackPlan:
    """Return the plan in a file, with all its policies checked.

    Raises:
        NotFoundError, CorruptArtifactError, ArtifactVersionError, StorageError: as
            `read_json_artifact`, or it names an unknown policy.
    """
    plan = read_json_artifact(path, PackPlan)
    require_plan_names(path, plan, remedy="make it again with moe-tool plan")
    return plan


def require_plan_names(path: Path, plan: PackPlan, *, remedy: str) -> None:
    """Refuse a plan with unknown policies or replicas.

    Raises:
        CorruptArtifactError: a policy or a replica precision does not exist.
    """
    named_eviction(path, plan.eviction, remedy=remedy)
    if plan.policy is not None:
        named_miss_policy(path, plan.policy, remedy=remedy)
    if plan.quantizer not in QUANTIZERS:
        raise CorruptArtifactError(f"{path} names an unknown quantizer", hint=remedy)
    try:
        replica_precisions(plan.replicas)
    except ValueError as error:
        raise CorruptArtifactError(f"{path} names unknown replicas", hint=remedy) from error
