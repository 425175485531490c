"""Options of a session, and the defaults that a bundle's plan or calibration gives."""

import math
from dataclasses import dataclass
from typing import Any

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.budget.request import MemoryRequest, parse_memory_option
from moe_tool.budget.table_choice import AUTO_ROWS, RowsRequest, parse_rows
from moe_tool.policies.eviction import DEFAULT_EVICTION, EvictionChoice, parse_eviction
from moe_tool.policies.misses import EXACT_POLICY, MissChoice, parse_miss_policy
from moe_tool.runtime.activations import Activations
from moe_tool.runtime.memory_residency import Residency
from moe_tool.store.throttle import Throttle, parse_throttle


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Options of a session. None: as the bundle was planned or calibrated, else the default."""

    memory: MemoryRequest | None = None
    """Budget of the whole process; default auto"""
    policy: MissChoice | None = None
    """Policy that answers misses while decoding; default exact"""
    residency: Residency | None = None
    """Cache or frozen; default: cache for exact, frozen for lossy policies"""
    eviction: EvictionChoice | None = None
    """Eviction policy of a full cache; default lru"""
    record_trace: bool = False
    """Whether to record every layer call for `write_trace`"""
    prefetch: str | None = None
    """Text for policies.prefetch.parse_prefetch; default none"""
    lossy_prompt: bool = False
    """Whether the policy answers prompts too, which otherwise are exact"""
    shadow: int | None = None
    """Interval in decoded tokens at which one's loss is measured, and it is made exact; 0: never;
    None: as the text needs it where a loss is to be kept, else never"""
    sparse_experts: float | None = None
    """Share of an expert's channels left out while decoding one sequence, for bundles with experts
    in channels; None: all are computed"""
    rows: RowsRequest | None = None
    """Embedding tables that stay on disk, of which only rows are read; default the bundle's"""
    throttle: Throttle | None = None
    """Disk that the run pretends to have, for measurements; None: the real one"""
    activations: Activations = "float32"
    """Precision of tokens in products with a checkpoint's own codes; int8 is not exact"""
    gates: bool = True
    """Whether lossy policies keep BuddyMoE's gates"""
    seed: int = 0
    """Seed of random policies"""
    threads: int | None = None
    """Threads of computation for the whole process; None: all cores, or all but one if torch
    computes the experts"""
    context: int = 4096
    """Positions per sequence, prompt included; capped at the model's maximum"""
    prompt_tokens: int | None = None
    """Longest prompt in tokens; None: unknown"""
    batch: int = 1
    """Sequences at once"""
    caller_bytes: int = 0
    """Memory that the caller holds while the session runs"""


def run_options(
    *,
    memory: str | None = None,
    policy: str | None = None,
    eviction: str | None = None,
    rows: str | None = None,
    throttle: str | None = None,
    **rest: Any,
) -> RunOptions:
    """Return the options for words of the command line.

    Args:
        memory: "4GiB", "50%" of the experts, "min" or "auto".
        policy: "buddy:rho=1", see `parse_miss_policy`.
        eviction: "lfu:halve-every=128", see `parse_eviction`.
        rows: "auto", "none" or "64MiB"; None: as the bundle was packed.
        throttle: "200MB/s" or "200MB/s,100us", see `parse_throttle`.
        rest: other fields of RunOptions.

    Raises:
        UsageError: a word is unknown.
    """
    return RunOptions(
        memory=parse_memory_option(memory),
        policy=None if policy is None else parse_miss_policy(policy),
        eviction=None if eviction is None else parse_eviction(eviction),
        rows=None if rows is None else parse_rows(rows),
        throttle=None if throttle is None else parse_throttle(throttle),
        **rest,
    )


def default_policy(manifest: BundleManifest) -> MissChoice:
    """Return the policy that the bundle was calibrated for, else planned for, else exact."""
    if manifest.calibration is not None:
        return parse_miss_policy(manifest.calibration.policy)
    if manifest.plan is not None and manifest.plan.policy is not None:
        return parse_miss_policy(manifest.plan.policy)
    return EXACT_POLICY


def default_eviction(policy: MissChoice, residency: Residency) -> EvictionChoice:
    """Return lfu for a cache whose misses are answered by price, since what answers in their place
    is used again and again; else lru."""
    by_price = residency == "cache" and policy.spec.residents == "cheapest"
    return parse_eviction("lfu") if by_price else DEFAULT_EVICTION


def is_steered(policy: MissChoice) -> bool:
    """Return whether a run's reads are kept at a target of expected loss."""
    values = policy.values
    return "kl" in values and math.isinf(values["nats-per-mb"]) and not math.isinf(values["kl"])


def default_rows(manifest: BundleManifest) -> RowsRequest:
    """Return the request that the bundle was packed with, else auto."""
    tables = manifest.row_tables
    return AUTO_ROWS if tables is None else parse_rows(tables.rows)


def default_residency(policy: MissChoice, manifest: BundleManifest) -> Residency:
    """Return cache residency for exact answers, for a policy that the bundle was planned with in
    caches and for one that follows the text by a target of loss; frozen for other lossy ones, so
    that a run is a function of its inputs."""
    if policy == EXACT_POLICY:
        return "cache"
    plan, calibration = manifest.plan, manifest.calibration
    if plan is not None and policy.name == plan.policy:
        return plan.residency or "frozen"
    if calibration is not None and policy.name == calibration.policy:
        return "frozen"
    return "cache" if is_steered(policy) else "frozen"
