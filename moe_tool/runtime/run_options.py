"""How a session is asked to run, and what a bundle's plan or calibration fills in."""

from dataclasses import dataclass
from typing import Any

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.budget.request import MemoryRequest, parse_memory_option
from moe_tool.policies.eviction import EvictionChoice, parse_eviction
from moe_tool.policies.misses import MissChoice, parse_miss_policy
from moe_tool.runtime.moe_layer import Residency

DEFAULT_EVICTION = parse_eviction("lru")
EXACT_POLICY = parse_miss_policy("exact")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What is asked of a session. None: what the bundle was planned or calibrated for, else the
    default."""

    memory: MemoryRequest | None = None
    """Budget of the whole process; default auto"""
    policy: MissChoice | None = None
    """Answers misses while decoding; default exact"""
    residency: Residency | None = None
    """Default: cache for exact, frozen for lossy policies"""
    eviction: EvictionChoice | None = None
    """Chooses the expert that leaves a full cache; default lru"""
    record_trace: bool = False
    """Keep what every layer call names, for `write_trace`"""
    prefetch: str | None = None
    """Key of policies.prefetch.PREFETCH: experts read while decoding before they are wanted;
    default none"""
    lossy_prompt: bool = False
    """The policy answers prompts too, which otherwise are exact"""
    shadow: int = 0
    """Every so many decoded tokens one is also computed exactly, and the step's loss measured; 0:
    none"""
    sparse_experts: float | None = None
    """Share of an expert's channels that is left out while decoding one sequence, for bundles that
    hold experts in channels; None: all are computed"""
    gates: bool = True
    """Lossy policies keep BuddyMoE's gates"""
    seed: int = 0
    """Seed of policies that draw"""
    threads: int | None = None
    """Threads of computation; None: all cores, or all but one where torch computes the experts.
    Set for the whole process."""
    context: int = 4096
    """Positions per sequence, prompt included; capped at what the model was made for"""
    prompt_tokens: int | None = None
    """Longest prompt in tokens, where it is known"""
    batch: int = 1
    """Sequences at once"""
    caller_bytes: int = 0
    """Memory that the caller itself will hold while the session runs"""


def run_options(
    *,
    memory: str | None = None,
    policy: str | None = None,
    eviction: str | None = None,
    **rest: Any,
) -> RunOptions:
    """Return the options that words of the command line name.

    Args:
        memory: "4GiB", "50%" of the experts, "min" or "auto".
        policy: "buddy:rho=1", see `parse_miss_policy`.
        eviction: "lfu:halve-every=128", see `parse_eviction`.
        rest: other fields of RunOptions, as they are.

    Raises:
        UsageError: a word is not known: with those that are.
    """
    return RunOptions(
        memory=parse_memory_option(memory),
        policy=None if policy is None else parse_miss_policy(policy),
        eviction=None if eviction is None else parse_eviction(eviction),
        **rest,
    )


def default_policy(manifest: BundleManifest) -> MissChoice:
    """Return what answers misses where nothing else is asked for: the policy that the bundle was
    calibrated for, else planned for, else exact."""
    if manifest.calibration is not None:
        return parse_miss_policy(manifest.calibration.policy)
    if manifest.plan is not None and manifest.plan.policy is not None:
        return parse_miss_policy(manifest.plan.policy)
    return EXACT_POLICY


def default_residency(policy: MissChoice) -> Residency:
    """Return the residency that fits a policy: exact answers read into a cache, lossy ones keep
    what is in memory frozen, so that a run is a function of its inputs."""
    return "cache" if policy == EXACT_POLICY else "frozen"
