"""How a session is opened, and what of it a bundle's plan decides."""

from dataclasses import dataclass

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.artifacts.pack_plan import PackPlan
from moe_tool.budget.request import AUTO, MemoryRequest
from moe_tool.budget.sizes import format_bytes
from moe_tool.policies.eviction import EvictionChoice, parse_eviction
from moe_tool.runtime.moe_layer import Residency
from moe_tool.runtime.policy_choice import EXACT
from moe_tool.runtime.prefetcher import NO_PREFETCH

DEFAULT_EVICTION = "lru"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a session is opened."""

    memory: MemoryRequest | None = None
    """Budget of the whole process; None: that of the bundle's plan, or auto"""
    policy: str | None = None
    """What answers a miss while decoding; None: what the bundle was calibrated or planned for, or
    exact"""
    residency: Residency | None = None
    """None: cache for exact, frozen for lossy policies"""
    eviction: str | None = None
    """Who leaves the expert cache, e.g. "lru", "lfu:halve-every=128" or "lru:per-layer"; None: as
    the plan has it, or lru"""
    record_trace: bool = False
    """Keep what every layer call names, for `Session.recorded`"""
    prefetch: str | None = None
    """What is read while decoding before it is wanted; None: as the plan has it, or nothing"""
    lossy_prompt: bool = False
    """Whether the policy answers prompts too, which otherwise are exact"""
    shadow: int = 0
    """Every so many decoded tokens one is also computed exactly, and the step's loss measured; 0:
    none"""
    sparse_experts: float | None = None
    """Share of an expert's channels that is left out while decoding one sequence, for bundles that
    hold experts in channels; None: all are computed"""
    gates: bool = True
    """Whether lossy policies keep BuddyMoE's gates"""
    seed: int = 0
    """Of policies that draw"""
    threads: int | None = None
    """Threads of computation; None: all cores, or all but one where torch computes the experts.
    Set for the whole process."""
    context: int = 4096
    """Positions per sequence, prompt included; capped at what the model was made for"""
    prompt: int | None = None
    """Longest prompt in tokens, where it is known"""
    batch: int = 1
    """Sequences at once"""
    caller_bytes: int = 0
    """What the caller will hold itself while the session runs"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the options leave open, decided."""

    memory: MemoryRequest
    eviction: EvictionChoice
    prefetch: str
    note: str | None
    """What of it is the plan's, in one line; None where nothing is"""


def default_residency(policy: str | None) -> Residency:
    """Return the residency of a policy where none is asked for: a cache under exact answers, also
    where no policy is named, a frozen set under lossy ones."""
    return "cache" if policy in (None, EXACT) else "frozen"


def residency_of(options: RunOptions) -> Residency:
    """Return the residency that was asked for, or that fits the policy."""
    return options.residency or default_residency(options.policy)


def default_policy(manifest: BundleManifest) -> str:
    """Return what answers misses where nothing else is asked for: what the bundle was calibrated
    for, else what it was planned for, else exact."""
    if manifest.calibration is not None:
        return manifest.calibration.policy
    if manifest.plan is not None and manifest.plan.policy is not None:
        return manifest.plan.policy
    return EXACT


def follow_plan(options: RunOptions, plan: PackPlan | None) -> Setting:
    """Return the setting of a session: what was asked for, else the plan's, else the defaults.

    Under a frozen residency nothing is evicted or read ahead, whatever the plan has.

    Raises:
        UsageError: the eviction policy is not known.
    """
    is_frozen = residency_of(options) == "frozen"
    memory, eviction, prefetch = options.memory, options.eviction, options.prefetch
    followed = []
    if plan is not None:
        if memory is None:
            memory = MemoryRequest(kind="bytes", size_bytes=plan.memory_bytes)
            followed.append(f"memory {format_bytes(plan.memory_bytes)}")
        if eviction is None and not is_frozen:
            eviction = plan.eviction
            followed.append(f"eviction {eviction}")
        if prefetch is None and not is_frozen:
            prefetch = plan.prefetch
            followed.append(f"prefetch {prefetch}")
    return Setting(
        memory=memory or AUTO,
        eviction=parse_eviction(eviction or DEFAULT_EVICTION),
        prefetch=prefetch or NO_PREFETCH,
        note=f"as planned: {', '.join(followed)}" if followed else None,
    )
