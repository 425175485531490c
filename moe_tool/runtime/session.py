"""Session: a model ready to generate from a bundle within a memory budget; Python API of `run`."""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from moe_tool.allocator import return_freed_memory, trim
from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.artifacts.expert_ids import LayerIds
from moe_tool.available_memory import (
    anonymous_rss_bytes,
    available_memory_bytes,
    current_rss_bytes,
)
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.attention_sums import AttentionSums
from moe_tool.models.bundle_skeleton import bundle_loader, open_bundle_skeleton
from moe_tool.models.kv_cache import new_kv_cache
from moe_tool.models.skeleton import Skeleton
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.native.kernels import round_tokens
from moe_tool.policies.misses import MissChoice
from moe_tool.policies.prefetch import parse_prefetch
from moe_tool.progress import SILENT, Progress
from moe_tool.runtime.activations import Activations
from moe_tool.runtime.call_recorder import CallRecorder
from moe_tool.runtime.drift_watch import DriftWatch
from moe_tool.runtime.finite_logits import require_finite_logits
from moe_tool.runtime.first_use import use_torch_once
from moe_tool.runtime.foresight import Foresight, foresee
from moe_tool.runtime.measured_costs import MeasuredCosts
from moe_tool.runtime.memory_residency import Residency
from moe_tool.runtime.moe_layer import Forward, MoeLayerRunner
from moe_tool.runtime.open_stores import MakeStore, open_stores, stored_masks
from moe_tool.runtime.partial_layer import choose_part_prefetcher
from moe_tool.runtime.plan_run import RunPlan, announcements, plan_run, settle, with_policy
from moe_tool.runtime.policy_choice import with_masks
from moe_tool.runtime.prefetcher import choose_prefetcher
from moe_tool.runtime.price_list import record_sizes
from moe_tool.runtime.quality_account import QualityAccount
from moe_tool.runtime.quality_promise import open_account
from moe_tool.runtime.run_options import RunOptions
from moe_tool.runtime.text_learner import TextLearner, learn_of_text
from moe_tool.store.throttle import ThrottledDisk

_WARM_UP_TOKENS = 2


@dataclass(slots=True, kw_only=True)
class Session:
    """A loaded model whose experts come from a bundle. Close it, or use it as a context manager."""

    bundle: BundleReader
    """Bundle of the experts; closed with the session"""
    skeleton: Skeleton
    tokenizer: Any
    plan: RunPlan
    runner: MoeLayerRunner
    make_store: MakeStore
    prompt_tokens: int | None = None
    """Positions that count as prompt in later forwards; None: a forward of one token with a cache
    is decoding"""
    learner: TextLearner = field(init=False)
    progress: Progress = SILENT
    """Listener that is told once when text is routed unlike the profile's"""
    torch_threads_before: int
    """Number of torch's threads to restore when the session closes"""
    _hooks: list[Any] = field(default_factory=list, repr=False)

    @property
    def model(self) -> transformers.PreTrainedModel:
        """The transformers model; its `generate` and `forward` work as usual."""
        return self.skeleton.model

    @property
    def manifest(self) -> BundleManifest:
        """Manifest of the bundle."""
        return self.bundle.manifest

    def new_cache(self) -> transformers.DynamicCache:
        """Return an empty KV cache with room for the planned positions."""
        return new_kv_cache(self.model.config, n_positions=self.plan.workload.positions)

    def use_policy(self, policy: MissChoice, *, residency: Residency) -> None:
        """Switch to another miss policy; the cache is kept, the pinned set follows `residency`.

        Raises:
            UsageError: the bundle lacks what the policy needs.
        """
        plan = with_policy(self.plan, policy, residency, self.manifest, self.skeleton)
        plan = replace(plan, policy=with_masks(plan.policy, self.bundle))
        before, self.plan = self.plan, plan
        if (residency, plan.rooms) != (before.residency, before.rooms):
            self.empty_cache()
        self.runner.residency = residency
        self.runner.policy = plan.policy
        self.keep_promise()

    def keep_promise(self, *, is_kept: bool = True) -> None:
        """Open the account of the policy, and what learns of the text: by measured losses where a
        loss is to be kept or measured, and the worth of a read where it follows a target.

        Args:
            is_kept: whether the account has its limit.
        """
        policy, runner = self.plan.policy, self.runner
        runner.account = open_account(self.manifest, policy)
        if not is_kept:
            runner.account = QualityAccount()
        self.learner = learn_of_text(
            runner, policy, layers=self.manifest.shape.layers, every=self.plan.options.shadow
        )

    def empty_cache(self) -> None:
        """Evict every expert that is not pinned."""
        self.runner.store.close()
        self.runner.store = self.make_store(self.bundle, self.plan.rooms, self.plan.eviction)

    def use_activations(self, activations: Activations) -> None:
        """Switch the precision of tokens; evicts every expert that is not pinned."""
        round_tokens(activations == "int8")
        self.empty_cache()

    def close(self) -> None:
        """Stop the reader threads, free the memory and close the bundle."""
        while self._hooks:
            self._hooks.pop().remove()
        if self.runner.part_prefetcher is not None:
            self.runner.part_prefetcher.close()
        if self.runner.attention is not None:
            self.runner.attention.close()
        torch.set_num_threads(self.torch_threads_before)
        round_tokens(False)
        self.runner.store.close()
        self.bundle.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __post_init__(self) -> None:
        """Open the account, and install the hooks around every forward."""
        self.keep_promise()
        self._hooks += [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward),
        ]

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Set phase and number of sequences of the coming forward."""
        if self.runner.is_probe:
            return
        given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
        ids: torch.Tensor = next(value for value in given if value is not None)
        n_sequences, n_new = ids.shape[:2]
        cache = kwargs.get("past_key_values")
        n_seen = 0 if cache is None else int(cache.get_seq_length())
        if self.prompt_tokens is None:
            is_prompt = n_seen == 0 or n_new > 1
        else:
            is_prompt = n_seen < self.prompt_tokens
        forward = Forward(phase="prompt" if is_prompt else "decode", n_sequences=n_sequences)
        self.runner.forward = forward
        self.plan.threads.before_forward(n_sequences * n_new)
        if self.runner.watch is not None:
            mask = kwargs.get("attention_mask")
            self.runner.watch.begin_forward(n_sequences, n_new, mask=mask, is_first=n_seen == 0)
        if n_seen == 0:
            self.learner.begin_sequences(n_sequences)
            self.runner.store.begin_sequence()
        if self.runner.attention is not None:
            self.runner.attention.listen(is_prompt)
        if not is_prompt:
            exact = self.learner.begin_token(self.model, kwargs)
            self.runner.forward = replace(forward, exact_fallback=exact)
        counters = self.runner.stats.phase(forward.phase)
        counters.forwards += 1
        counters.tokens += n_sequences * n_new

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        require_finite_logits(output.logits, self.bundle.folder)
        if self.runner.is_probe:
            return
        if self.runner.watch is not None:
            note = self.runner.watch.end_forward()
            if note is not None:
                self.progress.note(note)
        self.learner.end_token(output.logits[:, -1])


def open_session(
    folder: Path,
    options: RunOptions,
    *,
    tokenizer: Any = None,
    progress: Progress = SILENT,
    make_store: MakeStore = open_stores,
) -> Session:
    """Load a bundle into a memory budget.

    A budget that is too small is refused before anything large is loaded. Sets torch's threads and
    the C allocator's thresholds, and silences transformers' warnings, all for the whole process.
    The session never makes the process larger than the budget; memory freed earlier by the process
    is not counted against it.

    Args:
        folder: folder of the bundle.
        options: budget, policy and largest request.
        tokenizer: the bundle's tokenizer, if the caller has loaded it.
        progress: told about the loading, and that a policy is lossy.
        make_store: opens the store of the experts.

    Raises:
        UsageError, BudgetError, NotFoundError, UnsupportedModelError: as `plan_run`.
        CorruptArtifactError, NotFoundError: the bundle is damaged or missing.
    """
    bundle = BundleReader.open(folder)
    try:
        return load_session(
            bundle, options, tokenizer=tokenizer, progress=progress, make_store=make_store
        )
    except BaseException:
        bundle.close()
        raise


def load_session(
    bundle: BundleReader,
    options: RunOptions,
    *,
    tokenizer: Any = None,
    progress: Progress = SILENT,
    make_store: MakeStore = open_stores,
) -> Session:
    """Plan the run of an open bundle and load it; see `open_session`.

    The session closes the bundle; if loading fails, the caller has to.
    """
    return_freed_memory()
    manifest = bundle.manifest
    # Both take memory of the process, which the plan has to know.
    use_torch_once()
    if tokenizer is None:
        tokenizer = load_tokenizer(bundle.folder)
    costs = MeasuredCosts()
    if make_store is open_stores:
        disk = _slow_disk(bundle, options)
        make_store = partial(open_stores, disk=disk, time_reads=costs.time_reads)
    with open_bundle_skeleton(bundle) as checkpoint:
        loader = bundle_loader(bundle, checkpoint)
        plan = plan_run(
            options,
            bundle,
            loader,
            used_bytes=current_rss_bytes(),
            available_bytes=_reachable_bytes(),
        )
        torch_threads_before = torch.get_num_threads()
        plan.threads.begin()
        progress.begin("load the skeleton", None, "")
        skeleton = loader.load(
            {name: bundle.tables.open(loader.tables[name].parts) for name in plan.on_disk}
        )
        progress.end()
    _warm_up(skeleton)
    process_bytes = max(0, current_rss_bytes() - plan.skeleton_bytes)
    plan = settle(plan, manifest, process_bytes=process_bytes, available_bytes=_reachable_bytes())
    plan = replace(plan, policy=with_masks(plan.policy, bundle))
    _announce(plan, bundle, progress)
    round_tokens(options.activations == "int8")
    runner = _runner(plan, bundle, skeleton, make_store)
    runner.costs = costs
    if manifest.selectors:
        runner.store.load_pinned(progress)
    skeleton.set_experts_function(runner)
    return Session(
        bundle=bundle,
        skeleton=skeleton,
        tokenizer=tokenizer,
        plan=plan,
        runner=runner,
        make_store=make_store,
        torch_threads_before=torch_threads_before,
        progress=progress,
    )


def _slow_disk(bundle: BundleReader, options: RunOptions) -> ThrottledDisk | None:
    """Return the disk that experts and rows of tables pretend to read from; None: the real one."""
    if options.throttle is None:
        return None
    disk = ThrottledDisk(speed=options.throttle)
    bundle.tables.pace = disk.paced
    return disk


def _reachable_bytes() -> int:
    """Return the possible size of this process, its present size included."""
    return anonymous_rss_bytes() + available_memory_bytes()


def _announce(plan: RunPlan, bundle: BundleReader, progress: Progress) -> None:
    """Announce the run, once it is known whether the file system reads directly."""
    for note in announcements(plan, bundle.manifest):
        progress.note(note)
    if plan.options.sparse_experts is None:  # selected channels come from the page cache, in runs
        refusal = bundle.read_directly()
        if refusal is not None:
            progress.note(f"{refusal}: experts are read through it, slower")


def _runner(
    plan: RunPlan, bundle: BundleReader, skeleton: Skeleton, make_store: MakeStore
) -> MoeLayerRunner:
    """Open the stores of a planned run and return its experts function."""
    manifest, shape = bundle.manifest, bundle.manifest.shape
    is_lossy = plan.policy.is_lossy
    return MoeLayerRunner(
        store=make_store(bundle, plan.rooms, plan.eviction),
        account=open_account(manifest, plan.policy),
        residency=plan.residency,
        policy=plan.policy,
        sparsity=plan.options.sparse_experts,
        prefetcher=choose_prefetcher(plan.prefetch, skeleton.layers, plan.policy.rules),
        part_prefetcher=choose_part_prefetcher(plan.prefetch, skeleton),
        foresight=_foresight(skeleton, plan),
        recorder=CallRecorder(ids=LayerIds(shape.layers, shape.experts))
        if plan.options.record_trace
        else None,
        is_lossy_prompt=plan.options.lossy_prompt and is_lossy,
        stored=stored_masks(manifest),
        record_bytes=record_sizes(manifest),
        watch=None if manifest.routing_norm is None else DriftWatch(manifest.routing_norm),
        attention=AttentionSums(skeleton.model, shape.layers)
        if plan.workload.keeps_scores
        else None,
    )


def _foresight(skeleton: Skeleton, plan: RunPlan) -> Foresight | None:
    """Return the foresight that the eviction policy or a trace needs; None if neither does."""
    prefetch = parse_prefetch(plan.prefetch)
    # From a part of a layer the prefetcher predicts itself, and its predictions are recorded.
    is_traced = plan.options.record_trace and prefetch.alpha is None
    depth = max(plan.eviction.look_ahead, prefetch.depth if is_traced else 0)
    return foresee(skeleton.layers, depth=depth) if depth else None


def _warm_up(skeleton: Skeleton) -> None:
    """Run two tokens without experts, so that torch's one-time allocations are measured."""
    skeleton.set_experts_function(lambda call: torch.zeros_like(call.hidden))
    ids = torch.zeros(1, _WARM_UP_TOKENS, dtype=torch.int64)
    with torch.inference_mode():
        output = skeleton.model(input_ids=ids, use_cache=True)
        skeleton.model(input_ids=ids[:, :1], past_key_values=output.past_key_values, use_cache=True)
    del output
    trim()
