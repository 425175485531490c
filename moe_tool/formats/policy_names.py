"""Check that policies and quantizers named in a file exist and can have its parameters."""

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
        CorruptArtifactError: there is none, and nobody typed it: the file is at fault.
    """
    try:
        return parse_eviction(name)
    except UsageError as error:
        raise CorruptArtifactError(
            f"{path} names an eviction policy that there is none of", hint=remedy
        ) from error


def named_miss_policy(path: Path, name: str, *, remedy: str) -> MissChoice:
    """Return the miss policy that a file names, likewise."""
    try:
        return parse_miss_policy(name)
    except UsageError as error:
        raise CorruptArtifactError(
            f"{path} names a miss policy that there is none of", hint=remedy
        ) from error


def read_plan(path: Path) -> PackPlan:
    """Return a plan that can be followed.

    Raises:
        NotFoundError, CorruptArtifactError, ArtifactVersionError, StorageError: as
            `read_json_artifact`, or it names a policy that there is none of.
    """
    plan = read_json_artifact(path, PackPlan)
    require_plan_names(path, plan, remedy="make it again with moe-tool plan")
    return plan


def require_plan_names(path: Path, plan: PackPlan, *, remedy: str) -> None:
    """Refuse a plan that names policies, replicas or a quantizer that there are none of.

    Raises:
        CorruptArtifactError: the file that holds it is at fault.
    """
    named_eviction(path, plan.eviction, remedy=remedy)
    if plan.policy is not None:
        named_miss_policy(path, plan.policy, remedy=remedy)
    if plan.quantizer not in QUANTIZERS:
        raise CorruptArtifactError(f"{path} names a quantizer that there is none of", hint=remedy)
    try:
        replica_precisions(plan.replicas)
    except ValueError as error:
        raise CorruptArtifactError(
            f"{path} names replicas that there are none of", hint=remedy
        ) from error
