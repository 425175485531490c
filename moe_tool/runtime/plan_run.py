"""Plan of a run: every decision and refusal, before anything large is loaded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.artifacts.pack_plan import PackPlan
from moe_tool.budget.account import MemoryPlan, plan_memory
from moe_tool.budget.refusal import MemoryLine
from moe_tool.budget.request import AUTO, MemoryRequest
from moe_tool.budget.sizes import format_bytes
from moe_tool.budget.slots import ExpertRoom
from moe_tool.budget.table_choice import RowsRequest, describe_tables
from moe_tool.errors import BudgetError, UsageError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.skeleton import Skeleton
from moe_tool.models.skeleton_loader import SkeletonLoader
from moe_tool.native.kernels import is_native
from moe_tool.policies.eviction import DEFAULT_EVICTION, EvictionChoice, parse_eviction
from moe_tool.policies.misses import EXACT_POLICY, MissChoice
from moe_tool.policies.prefetch import NO_PREFETCH, parse_prefetch
from moe_tool.runtime.activations import INT8_NOTE, require_activations
from moe_tool.runtime.compute_threads import ComputeThreads, choose_threads
from moe_tool.runtime.first_use import first_use_bytes
from moe_tool.runtime.memory_residency import Residency
from moe_tool.runtime.open_stores import choose_rooms, staying_by_form
from moe_tool.runtime.partial_layer import require_part, require_recordable
from moe_tool.runtime.policy_choice import ChosenPolicy, choose_policy
from moe_tool.runtime.prefetcher import require_prefetch
from moe_tool.runtime.quality_promise import quality_note
from moe_tool.runtime.residency import FormRoom, expert_rooms
from moe_tool.runtime.run_options import (
    RunOptions,
    default_eviction,
    default_policy,
    default_residency,
    default_rows,
)
from moe_tool.runtime.sparse_experts import describe_sparse, require_exact, require_sparse
from moe_tool.runtime.stacked_gates import gate_bytes
from moe_tool.runtime.working_set import Workload, positions_within, run_lines

_LOSSY_PROMPT = (
    "lossy prefill: the policy answers the prompt too, and what that leaves in the KV cache stays"
)
_CACHED_ANSWERS = (
    "what is in memory changes with the text, its eviction and prefetch, and the answers with it"
)
_EXACT_PROMPT = "lossy prefill changes nothing: the policy reads every miss"


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Memory of a run apart from the process and the expert slots."""

    request: MemoryRequest
    """Requested or planned budget"""
    fixed: tuple[MemoryLine, ...]
    """Account without the process and the expert slots"""
    loading_bytes: int
    """Peak memory of loading the skeleton, beside the process"""
    experts: tuple[ExpertRoom, ...]
    """Cost of expert slots, by primary table"""

    def within(self, process_bytes: int, available_bytes: int) -> MemoryPlan:
        """Return the account with the expert slots that fit the budget.

        Raises:
            BudgetError: the budget is below what the run needs.
        """
        process = MemoryLine(name="process and its libraries", size_bytes=process_bytes)
        return plan_memory(
            self.request,
            fixed=(process, *self.fixed),
            loading_bytes=process_bytes + self.loading_bytes,
            experts=self.experts,
            available_bytes=available_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """All decisions about a run; `open_session` carries them out."""

    options: RunOptions
    """Options of the user, before the bundle's plan filled in any"""
    policy: ChosenPolicy
    residency: Residency
    eviction: EvictionChoice
    prefetch: str
    """Name of a `PrefetchChoice`"""
    workload: Workload
    threads: ComputeThreads
    footprint: Footprint
    process_bytes: int
    """Least size of the process in the account, the reserve for the first use included"""
    on_disk: Mapping[str, int]
    """Embedding table that stays on disk -> bytes that it would take in memory"""
    skeleton_bytes: int
    """Size of the loaded skeleton"""
    memory: MemoryPlan
    """Account of the budget: an estimate until `settle` knows the size of the process"""
    rooms: tuple[FormRoom, ...]
    """Slots and pinned experts of each form"""
    followed: str | None
    """Line about settings taken from the bundle's plan; None if none was"""


def plan_run(
    options: RunOptions,
    bundle: BundleReader,
    skeleton: SkeletonLoader,
    *,
    used_bytes: int,
    available_bytes: int,
) -> RunPlan:
    """Return the plan of a run. Nothing is loaded, read or changed.

    The account has a reserve for the first use of the model; `settle` counts no less.

    Args:
        options, bundle: options of the user, and the open bundle.
        skeleton: checked, not yet loaded.
        used_bytes: size of the process now, after `use_torch_once`.
        available_bytes: possible size of the process, its present size included.

    Raises:
        UsageError: options that contradict each other or the bundle.
        BudgetError: the budget is below what the session needs.
        NotFoundError, UnsupportedModelError: as `choose_policy`.
    """
    manifest = bundle.manifest
    choice = options.policy or default_policy(manifest)
    residency = options.residency or default_residency(choice, manifest)
    _check(options, choice, residency, manifest)
    require_sparse(options, choice, bundle)
    require_activations(options.activations, manifest.primaries)
    followed = follow_plan(options, manifest.plan, choice, residency)
    require_prefetch(followed.prefetch, residency=residency)
    require_part(followed.prefetch, skeleton.model, skeleton.layers)
    if options.record_trace:
        require_recordable(followed.prefetch, followed.eviction)
    workload = _workload(options, choice, skeleton.config.get_text_config())
    account = partial(_footprint, options, followed, bundle, skeleton, workload)
    rows = options.rows or default_rows(manifest)
    process_bytes = used_bytes + first_use_bytes(skeleton.held_bytes)
    on_disk = _tables_on_disk(rows, skeleton, account, process_bytes, available_bytes)
    footprint = account(on_disk)
    memory = footprint.within(process_bytes, available_bytes)
    policy = choose_policy(
        choice, manifest, skeleton.layers, skeleton.config, residency=residency, options=options
    )
    return RunPlan(
        options=options,
        policy=policy,
        residency=residency,
        eviction=followed.eviction,
        prefetch=followed.prefetch,
        workload=workload,
        threads=choose_threads(options.threads, manifest),
        footprint=footprint,
        process_bytes=process_bytes,
        on_disk=on_disk,
        skeleton_bytes=skeleton.held_bytes - sum(on_disk.values()),
        memory=memory,
        rooms=choose_rooms(manifest, memory.slots, residency, followed.eviction, policy),
        followed=followed.note,
    )


def settle(
    plan: RunPlan, manifest: BundleManifest, *, process_bytes: int, available_bytes: int
) -> RunPlan:
    """Return the plan with the slots that fit now that the size of the process is known.

    Args:
        plan, manifest: plan of `plan_run` and manifest of its bundle.
        process_bytes: size of the process without the skeleton, after a first forward.
        available_bytes: possible size of the process, its present size included.

    Raises:
        BudgetError: the budget is below what the session needs.
    """
    # No less than the reserve, so that a refused budget and a suggested one stay what they are.
    memory = plan.footprint.within(max(process_bytes, plan.process_bytes), available_bytes)
    rooms = choose_rooms(manifest, memory.slots, plan.residency, plan.eviction, plan.policy)
    return replace(plan, memory=memory, rooms=rooms)


def with_policy(
    plan: RunPlan,
    choice: MissChoice,
    residency: Residency,
    manifest: BundleManifest,
    skeleton: Skeleton,
) -> RunPlan:
    """Return the plan with another policy in the same memory.

    Raises:
        UsageError: the policy does not allow left-out channels or prefetch, or needs data that the
            bundle lacks.
        BudgetError: the memory has no room for the policy's cheaper forms.
        NotFoundError, UnsupportedModelError: as `choose_policy`.
    """
    if plan.options.sparse_experts is not None:
        require_exact(plan.options.sparse_experts, choice)
    require_prefetch(plan.prefetch, residency=residency)
    policy = choose_policy(
        choice,
        manifest,
        skeleton.layers,
        skeleton.model.config,
        residency=residency,
        options=plan.options,
    )
    rooms = choose_rooms(manifest, plan.memory.slots, residency, plan.eviction, policy)
    return replace(plan, policy=policy, residency=residency, rooms=rooms)


def announcements(plan: RunPlan, manifest: BundleManifest) -> list[str]:
    """Return the notes before the first token: what was planned, what is lossy, what is slow."""
    is_lossy = plan.policy.is_lossy
    notes = [plan.followed] if plan.followed is not None else []
    if is_lossy:
        notes.append(plan.policy.policy.describe())
        if plan.residency == "cache":
            notes.append(_CACHED_ANSWERS)
    promise = quality_note(manifest, plan.policy, n_slots=plan.memory.n_slots)
    if promise is not None:
        notes.append(promise)
    if plan.on_disk:
        notes.append(describe_tables(plan.on_disk))
    if plan.options.lossy_prompt:
        notes.append(_LOSSY_PROMPT if is_lossy else _EXACT_PROMPT)
    if not is_native():
        notes.append("the native kernels are not in use: torch computes the experts, slower")
    if plan.options.throttle is not None:
        notes.append(plan.options.throttle.describe())
    if plan.options.activations == "int8":
        notes.append(INT8_NOTE)
    if plan.options.sparse_experts is not None:
        notes.append(describe_sparse(plan.options.sparse_experts))
    staying = staying_by_form(manifest, plan.rooms)
    if len(staying) > 1:
        held = ", ".join(
            f"{count} at {form} bits" if form[0].isdigit() else f"{count} {form}"
            for form, count in staying.items()
        )
        notes.append(f"in memory of {len(manifest.primary_records)} experts: {held}")
    return notes


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """Settings from the options, the bundle's plan and the defaults."""

    memory: MemoryRequest
    eviction: EvictionChoice
    prefetch: str
    note: str | None


def follow_plan(
    options: RunOptions, plan: PackPlan | None, choice: MissChoice, residency: Residency
) -> Followed:
    """Return the options' settings, else the plan's, else the defaults.

    Under a frozen residency nothing is evicted or prefetched, whatever the plan says.
    """
    memory, eviction, prefetch = options.memory, options.eviction, options.prefetch
    words = []
    if plan is not None:
        if memory is None:
            memory = MemoryRequest(kind="bytes", size_bytes=plan.memory_bytes)
            words.append(f"memory {format_bytes(plan.memory_bytes)}")
        if eviction is None and residency != "frozen":
            eviction = parse_eviction(plan.eviction)
            words.append(f"eviction {plan.eviction}")
        if options.residency is None and plan.residency == residency and options.policy is None:
            words.append(f"residency {residency}")
        if prefetch is None and residency != "frozen":
            prefetch = plan.prefetch
            words.append(f"prefetch {prefetch}")
    return Followed(
        memory=memory or AUTO,
        eviction=eviction or default_eviction(choice, residency),
        prefetch=parse_prefetch(prefetch or NO_PREFETCH).name,
        note=f"as planned: {', '.join(words)}" if words else None,
    )


def _check(
    options: RunOptions, policy: MissChoice, residency: Residency, manifest: BundleManifest
) -> None:
    """Refuse options that contradict each other."""
    if options.eviction not in (None, DEFAULT_EVICTION) and residency == "frozen":
        raise UsageError(
            f"--eviction {options.eviction.name}: the experts in memory are frozen, so none is "
            "evicted",
            hint="--policy exact, or --residency cache",
        )
    if options.record_trace and (residency == "frozen" or policy != EXACT_POLICY):
        raise UsageError("--record-trace requires --policy exact", hint="--policy exact")
    if options.record_trace and len(manifest.primaries) > 1:
        raise UsageError(
            "--record-trace: the experts of this bundle have several sizes, and a trace has one",
            hint="record it with a bundle of one number of --bits: the routing is the same",
        )
    for name, value in (
        ("--threads", options.threads),
        ("--context", options.context),
        ("batch", options.batch),
        ("prompt tokens", options.prompt_tokens),
        ("--shadow", options.shadow or None),
    ):
        if value is not None and value < 1:
            raise UsageError(f"{name} {value}: at least 1 is needed")


def _workload(options: RunOptions, policy: MissChoice, config: Any) -> Workload:
    positions = positions_within(config, options.context)
    return Workload(
        batch=options.batch,
        positions=positions,
        prompt_tokens=positions
        if options.prompt_tokens is None
        else min(options.prompt_tokens, positions),
        keeps_scores=options.lossy_prompt and policy.spec.weighs_prompts,
    )


def _beside(bundle: BundleReader, followed: Followed, caller_bytes: int) -> dict[str, int]:
    """Return the memory that a run holds beside the model, bytes by name."""
    manifest, shape = bundle.manifest, bundle.manifest.shape
    pruning, eviction = manifest.pruning, followed.eviction
    return {
        "channel selectors": bundle.selector_bytes,
        "caller workspace": caller_bytes,
        "stacked gates": gate_bytes(followed.prefetch, shape),
        f"eviction state of {eviction.spec.name}": eviction.notes_bytes(
            n_layers=len(shape.layers), n_experts=shape.experts
        ),
        "mask routers": sum(
            file.size_bytes
            for file in manifest.files
            if pruning is not None and file.name == pruning.file
        ),
    }


def _footprint(
    options: RunOptions,
    followed: Followed,
    bundle: BundleReader,
    skeleton: SkeletonLoader,
    workload: Workload,
    on_disk: Mapping[str, int],
) -> Footprint:
    eviction = followed.eviction
    held_bytes = skeleton.held_bytes - sum(on_disk.values())
    return Footprint(
        request=followed.memory,
        fixed=run_lines(
            skeleton.config.get_text_config(),
            bundle.manifest.shape,
            workload,
            process_bytes=0,
            skeleton_bytes=held_bytes,
            beside=_beside(bundle, followed, options.caller_bytes),
        ),
        loading_bytes=held_bytes + skeleton.largest_without(on_disk),
        experts=expert_rooms(bundle.manifest, per_layer=eviction.per_layer),
    )


def _tables_on_disk(
    rows: RowsRequest,
    skeleton: SkeletonLoader,
    account: Callable[[Mapping[str, int]], Footprint],
    process_bytes: int,
    available_bytes: int,
) -> Mapping[str, int]:
    """Return the tables that stay on disk with their bytes in memory: none by itself if everything
    fits, the first use of the model included."""
    sizes = {name: table.held_bytes for name, table in skeleton.tables.items()}
    chosen = {name: sizes[name] for name in rows.choose(sizes)}
    if not chosen or rows.is_forced:
        return chosen
    whole = account({})
    try:
        memory = whole.within(process_bytes, available_bytes)
    except BudgetError:
        return chosen
    has_room = memory.n_slots == sum(room.n_experts for room in whole.experts)
    return {} if has_room else chosen
