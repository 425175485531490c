"""A bundle and a memory budget become a model that is ready to generate: the Python API of
`run`."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.available_memory import (
    anonymous_rss_bytes,
    available_memory_bytes,
    current_rss_bytes,
)
from moe_tool.errors import BudgetError, CorruptArtifactError, UsageError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.attention_sums import AttentionSums
from moe_tool.models.context_length import context_length
from moe_tool.models.kv_cache import new_kv_cache
from moe_tool.models.model_config import read_config
from moe_tool.models.skeleton import LayerCall, Skeleton
from moe_tool.models.skeleton_loader import SkeletonLoader
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.native.kernels import is_native
from moe_tool.policies.eviction import EvictionChoice, parse_eviction
from moe_tool.policies.misses import parse_miss_policy
from moe_tool.progress import SILENT, Progress
from moe_tool.runtime.allocator import return_freed_memory, trim
from moe_tool.runtime.call_recorder import CallRecorder
from moe_tool.runtime.compute_threads import ComputeThreads, choose_threads
from moe_tool.runtime.foresight import Foresight, foresee
from moe_tool.runtime.memory_plan import (
    MARGIN_BYTES,
    MemoryLine,
    MemoryPlan,
    parse_memory,
    plan_memory,
)
from moe_tool.runtime.moe_layer import MoeLayerRunner, Residency
from moe_tool.runtime.open_levels import choose_rooms, open_levels, staying_by_form
from moe_tool.runtime.policy_choice import EXACT, choose_policy, require_policy
from moe_tool.runtime.prefetcher import NO_PREFETCH, choose_prefetcher, require_prefetch
from moe_tool.runtime.quality_promise import open_account, quality_note
from moe_tool.runtime.residency import expert_rooms
from moe_tool.runtime.run_options import (
    DEFAULT_EVICTION,
    RunOptions,
    Setting,
    default_policy,
    default_residency,
    follow_plan,
)
from moe_tool.runtime.shadow import Shadow
from moe_tool.runtime.sparse_experts import describe_sparse, require_alone, require_sparse
from moe_tool.runtime.working_set import Workload, buffer_bytes, kv_cache_bytes

_FIRST_USE_BYTES = 16 * 2**20
"""What torch and transformers allocate when a model is first built and run: 8 to 10 MiB from tiny
models to 16 layers of width 2048, and as much to spare; measured instead once that has happened"""
_WARM_UP_TOKENS = 2
_LOSSY_PROMPT = (
    "lossy prefill: the policy answers the prompt too, and what that leaves in the KV cache stays"
)
_EXACT_PROMPT = "lossy prefill changes nothing: the policy reads every miss"


@dataclass(slots=True, kw_only=True)
class Session:
    """A loaded model whose experts come from a bundle. Close it, or use it as a context manager."""

    options: RunOptions
    bundle: BundleReader
    skeleton: Skeleton
    tokenizer: Any
    plan: MemoryPlan
    workload: Workload
    threads: ComputeThreads
    setting: Setting
    """What the options leave open is the plan's"""
    runner: MoeLayerRunner
    prompt_tokens: int | None = None
    """Positions that count as prompt in the forwards to come; None: a forward of one token with a
    cache is decoding"""
    shadow: Shadow | None = None
    _hooks: list[Any] = field(default_factory=list, repr=False)

    @property
    def model(self) -> transformers.PreTrainedModel:
        """The transformers model; its `generate` and `forward` work as ever."""
        return self.skeleton.model

    @property
    def manifest(self) -> BundleManifest:
        """What the bundle says of itself."""
        return self.bundle.manifest

    def new_cache(self) -> transformers.DynamicCache:
        """Return an empty KV cache with room for the planned positions."""
        config = self.model.config
        return new_kv_cache(config, n_positions=self.workload.positions)

    def use_policy(self, policy: str, *, residency: Residency) -> None:
        """Answer misses by another policy from now on; what the store holds stays, the pinned set
        follows `residency`.

        Raises:
            UsageError: the bundle lacks what the policy needs.
        """
        require_alone(self.runner.sparsity, policy)
        prefetcher = choose_prefetcher(
            self.setting.prefetch, self.skeleton.layers, residency=residency
        )
        chosen = choose_policy(
            policy,
            self.bundle,
            self.skeleton,
            gates=self.options.gates,
            seed=self.options.seed,
        )
        rooms = choose_rooms(
            self.manifest, self.plan.slots, residency, self.setting.eviction, chosen
        )
        if (residency, rooms) != (self.runner.residency, self.runner.rooms):
            self.runner.store.close()
            self.runner.store = open_levels(self.bundle, rooms, self.setting.eviction)
            self.runner.residency, self.runner.rooms = residency, rooms
        self.runner.policy = chosen
        self.runner.account = open_account(self.manifest, chosen)
        self.runner.prefetcher = prefetcher

    def empty_cache(self) -> None:
        """Forget every expert that is not pinned."""
        self.runner.store.close()
        self.runner.store = open_levels(self.bundle, self.runner.rooms, self.setting.eviction)

    def close(self) -> None:
        """Stop the reader threads and let go of the memory."""
        while self._hooks:
            self._hooks.pop().remove()
        if self.runner.attention is not None:
            self.runner.attention.close()
        torch.set_num_threads(self.threads.n_threads)
        self.runner.store.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Tell the layers which phase the coming forward belongs to, and how many sequences it
        carries."""
        given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
        ids: torch.Tensor = next(value for value in given if value is not None)
        n_sequences, n_new = ids.shape[:2]
        cache = kwargs.get("past_key_values")
        n_seen = 0 if cache is None else int(cache.get_seq_length())
        if self.prompt_tokens is None:
            is_prompt = n_seen == 0 or n_new > 1
        else:
            is_prompt = n_seen < self.prompt_tokens
        self.runner.phase = "prompt" if is_prompt else "decode"
        self.runner.n_sequences = n_sequences
        self.threads.before_forward(n_sequences * n_new)
        if self.runner.is_shadow:
            return
        if n_seen == 0:
            self.runner.account.begin_sequences(n_sequences)
        if self.runner.attention is not None:
            self.runner.attention.listen(is_prompt)
        if is_prompt:
            self.runner.answered_exactly = None
        else:
            if self.shadow is not None and self.shadow.is_due():
                self._compute_exactly(self.shadow, kwargs)
            self.runner.answered_exactly = self.runner.account.begin_token()
        counters = self.runner.stats.phase(self.runner.phase)
        counters.forwards += 1
        counters.tokens += n_sequences * n_new

    def _compute_exactly(self, shadow: Shadow, kwargs: dict[str, Any]) -> None:
        self.runner.is_shadow = True
        try:
            shadow.compute_exactly(self.model, kwargs)
        finally:
            self.runner.is_shadow = False

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not bool(torch.isfinite(output.logits.amax())):  # NaN is passed on; -inf is a mask
            raise CorruptArtifactError(
                f"the model of {self.bundle.folder} gives logits that are not finite, from which "
                "nothing can be predicted",
                hint=f"moe-tool inspect {self.bundle.folder} --verify tells whether the bundle is "
                "damaged; if it is intact, download the checkpoint again and pack it",
            )
        if self.shadow is not None and not self.runner.is_shadow:
            divergence = self.shadow.compare(output.logits[:, -1])
            if divergence is not None:
                self.runner.account.judge(divergence, tokens=len(output.logits))


def open_session(
    folder: Path,
    options: RunOptions,
    *,
    tokenizer: Any = None,
    progress: Progress = SILENT,
) -> Session:
    """Load a bundle into a memory budget.

    What does not fit is refused before anything large is loaded. Sets torch's threads and the C
    allocator's thresholds, and silences transformers' warnings, all for the whole process. Memory
    that the process has let go of before is its own: the promise is that the session never makes it
    larger than the budget.

    Args:
        folder: of the bundle.
        options: budget, policy and what is going to be asked for.
        tokenizer: the bundle's, where the caller has loaded it already.
        progress: told about the loading, and that a policy is lossy.

    Raises:
        UsageError: options that contradict each other or the bundle.
        BudgetError: the budget is below what the session needs.
        CorruptArtifactError, NotFoundError: the bundle is damaged or missing.
    """
    return_freed_memory()
    bundle = BundleReader.open(folder)
    if options.policy is None:
        options = replace(options, policy=default_policy(bundle.manifest))
    _check(options)
    require_sparse(options, bundle)
    if options.record_trace and bundle.manifest.others:
        raise UsageError(
            "--record-trace: the experts of this bundle have several sizes, and a trace has one",
            hint="record it with a bundle of one number of --bits: what is wanted is the same",
        )
    setting = follow_plan(options, bundle.manifest.plan)
    request = parse_memory(setting.memory)
    threads = choose_threads(options.threads, bundle.manifest)
    threads.begin()
    if tokenizer is None:
        tokenizer = load_tokenizer(folder)
    config = read_config(folder).get_text_config()
    workload = _workload(options, config)
    rooms = expert_rooms(bundle.manifest)

    def plan(process_bytes: int) -> MemoryPlan:
        return plan_memory(
            request,
            fixed=(
                *_fixed_lines(process_bytes, loader.held_bytes, config, bundle, workload, options),
                *_notes_line(setting.eviction, bundle.manifest),
                *_router_line(bundle.manifest),
            ),
            loading_bytes=process_bytes + loader.held_bytes + loader.largest_bytes,
            experts=rooms,
            available_bytes=anonymous_rss_bytes() + available_memory_bytes(),
        )

    with bundle.open_skeleton() as checkpoint:
        loader = SkeletonLoader(
            folder,
            checkpoint,
            shape=bundle.manifest.shape,
            precision=bundle.manifest.skeleton_precision,
            linears=bundle.manifest.skeleton_linears,
        )
        _refuse_early(plan)
        progress.begin("load the skeleton", None, "")
        skeleton = loader.load()
        progress.end()
    _warm_up(skeleton)
    memory = plan(max(0, current_rss_bytes() - loader.held_bytes))
    residency = default_residency(options)
    prefetcher = choose_prefetcher(setting.prefetch, skeleton.layers, residency=residency)
    assert options.policy is not None
    policy = choose_policy(
        options.policy,
        bundle,
        skeleton,
        gates=options.gates,
        seed=options.seed,
    )
    if setting.note is not None:
        progress.note(setting.note)
    if policy.policy.lossy:
        progress.note(policy.policy.describe())
    account = open_account(bundle.manifest, policy)
    note = quality_note(bundle.manifest, policy, n_slots=memory.n_slots)
    if note is not None:
        progress.note(note)
    if options.lossy_prompt:
        progress.note(_LOSSY_PROMPT if policy.policy.lossy else _EXACT_PROMPT)
    if not is_native():
        progress.note("the native kernels are not in use: torch computes the experts, slower")
    if options.sparse_experts is not None:  # chosen channels come out of the page cache, in runs
        progress.note(describe_sparse(options.sparse_experts))
    else:
        refusal = bundle.read_directly()
        if refusal is not None:
            progress.note(f"{refusal}: experts are read through it, slower")
    rooms_by_level = choose_rooms(
        bundle.manifest, memory.slots, residency, setting.eviction, policy
    )
    staying = staying_by_form(bundle.manifest, rooms_by_level)
    if len(staying) > 1:
        held = ", ".join(
            f"{count} at {form} bits" if form[0].isdigit() else f"{count} {form}"
            for form, count in staying.items()
        )
        progress.note(f"in memory of {sum(room.n_experts for room in rooms)} experts: {held}")
    runner = MoeLayerRunner(
        store=open_levels(bundle, rooms_by_level, setting.eviction),
        rooms=rooms_by_level,
        account=account,
        residency=residency,
        policy=policy,
        sparsity=options.sparse_experts,
        prefetcher=prefetcher,
        foresight=_foresight(skeleton, setting, options),
        recorder=CallRecorder(shape=bundle.manifest.shape) if options.record_trace else None,
        is_lossy_prompt=options.lossy_prompt and policy.policy.lossy,
        absent=_absent(bundle.manifest),
        record_bytes={
            layer: np.array(bundle.own_record_bytes(layer))
            for layer in bundle.manifest.shape.layers
        },
        attention=AttentionSums(skeleton.model, bundle.manifest.shape.layers)
        if workload.keeps_scores
        else None,
    )
    if bundle.chooser_level is not None:
        runner.store.load_pinned(progress)
    shadow = Shadow(every=options.shadow) if options.shadow and policy.policy.lossy else None
    skeleton.set_experts_function(runner)
    session = Session(
        options=options,
        bundle=bundle,
        skeleton=skeleton,
        tokenizer=tokenizer,
        plan=memory,
        workload=workload,
        threads=threads,
        setting=setting,
        runner=runner,
        shadow=shadow,
    )
    session._hooks = [
        skeleton.model.register_forward_pre_hook(session._before_forward, with_kwargs=True),
        skeleton.model.register_forward_hook(session._after_forward),
    ]
    return session


def _absent(manifest: BundleManifest) -> dict[int, torch.Tensor]:
    if not manifest.absent:
        return {}
    shape = manifest.shape
    found = {layer: torch.zeros(shape.experts, dtype=torch.bool) for layer in shape.layers}
    for layer, expert in manifest.absent:
        found[layer][expert] = True
    return found


def _refuse_early(plan: Callable[[int], MemoryPlan]) -> None:
    """Refuse before anything is loaded what cannot fit even if the first use took nothing.

    The refusal names a budget that leaves room for the first use, so that it works when typed.
    What lies between is decided by measurement, once the model has been run.
    """
    used = current_rss_bytes()
    try:
        plan(used)
    except BudgetError:
        plan(used + _FIRST_USE_BYTES)
        raise


def _fixed_lines(
    process_bytes: int,
    skeleton_bytes: int,
    config: Any,
    bundle: BundleReader,
    workload: Workload,
    options: RunOptions,
) -> tuple[MemoryLine, ...]:
    lines = [
        MemoryLine(name="process and its libraries", size_bytes=process_bytes),
        MemoryLine(name="skeleton", size_bytes=skeleton_bytes),
        MemoryLine(
            name=f"KV cache, {workload.positions} positions x {workload.batch}",
            size_bytes=kv_cache_bytes(config, workload),
        ),
        MemoryLine(
            name="working buffers", size_bytes=buffer_bytes(config, bundle.manifest.shape, workload)
        ),
        MemoryLine(name="margin", size_bytes=MARGIN_BYTES),
    ]
    if bundle.chooser_bytes:
        lines.append(
            MemoryLine(name="what chooses experts' channels", size_bytes=bundle.chooser_bytes)
        )
    if options.caller_bytes:
        lines.append(
            MemoryLine(name="what is done beside the run", size_bytes=options.caller_bytes)
        )
    return tuple(lines)


def _notes_line(eviction: EvictionChoice, manifest: BundleManifest) -> tuple[MemoryLine, ...]:
    shape = manifest.shape
    size_bytes = eviction.notes_bytes(n_layers=len(shape.layers), n_experts=shape.experts)
    line = MemoryLine(name=f"notes of eviction {eviction.kind}", size_bytes=size_bytes)
    return (line,) if size_bytes else ()


def _router_line(manifest: BundleManifest) -> tuple[MemoryLine, ...]:
    if manifest.pruning is None:
        return ()
    sizes = {file.name: file.size_bytes for file in manifest.files}
    return (MemoryLine(name="mask routers", size_bytes=sizes[manifest.pruning.file]),)


def _check(options: RunOptions) -> None:
    require_policy(options.policy or EXACT)
    if options.prefetch is not None:
        require_prefetch(options.prefetch)
    is_frozen = default_residency(options) == "frozen"
    if options.eviction is not None:
        parse_eviction(options.eviction)
        if is_frozen and options.eviction != DEFAULT_EVICTION:
            raise UsageError(
                f"--eviction {options.eviction}: the experts in memory are frozen, so none is "
                "evicted",
                hint="--policy exact, or --residency cache",
            )
    if options.record_trace and (is_frozen or options.policy != EXACT):
        raise UsageError(
            "--record-trace: what a lossy run asks for is not what the model wants",
            hint="--policy exact",
        )
    for name, value in (
        ("--threads", options.threads),
        ("--context", options.context),
        ("batch", options.batch),
        ("prompt", options.prompt),
        ("--shadow", options.shadow or None),
    ):
        if value is not None and value < 1:
            raise UsageError(f"{name} {value}: at least 1 is needed")


def _workload(options: RunOptions, config: Any) -> Workload:
    positions = min(options.context, context_length(config) or options.context)
    prompt = positions if options.prompt is None else min(options.prompt, positions)
    assert options.policy is not None
    choice = parse_miss_policy(options.policy)
    return Workload(
        batch=options.batch,
        positions=positions,
        prompt=prompt,
        keeps_scores=options.lossy_prompt and choice.weighs_prompts,
    )


def _foresight(skeleton: Skeleton, setting: Setting, options: RunOptions) -> Foresight | None:
    """Where the eviction policy looks ahead, or a trace is to say what a prefetch saw."""
    eviction = setting.eviction
    if "predictions" in eviction.hints:
        return foresee(skeleton.layers, depth=eviction.parameters["window"])
    if options.record_trace and setting.prefetch != NO_PREFETCH:
        return foresee(skeleton.layers, depth=1)
    return None


def _warm_up(skeleton: Skeleton) -> None:
    """Run two tokens without experts, so that what torch allocates once is measured and not
    guessed."""
    skeleton.set_experts_function(_nothing)
    ids = torch.zeros(1, _WARM_UP_TOKENS, dtype=torch.int64)
    with torch.inference_mode():
        output = skeleton.model(input_ids=ids, use_cache=True)
        skeleton.model(input_ids=ids[:, :1], past_key_values=output.past_key_values, use_cache=True)
    del output
    trim()


def _nothing(call: LayerCall) -> torch.Tensor:
    return torch.zeros_like(call.hidden)
