"""Story of `tune pruning`: train mask routers, then measure their KL on held-out text."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.artifacts.bundle_sections import LearnedPruning
from moe_tool.artifacts.evaluation_report import Estimate
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.available_memory import peak_rss_bytes
from moe_tool.budget.request import AUTO, MemoryRequest
from moe_tool.errors import BudgetError, DataSourceError, UnsupportedModelError, UsageError
from moe_tool.evaluation.divergence import divergence_scratch_bytes
from moe_tool.formats.atomic_write import storage_errors
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.mask_router_file import write_mask_router
from moe_tool.formats.training_state import (
    TrainingState,
    order_digest,
    read_training_state,
    write_training_state,
)
from moe_tool.kept_work import keeping
from moe_tool.models.context_length import context_length
from moe_tool.models.model_config import read_config
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.policies.misses import EXACT_POLICY
from moe_tool.progress import SILENT, Progress
from moe_tool.runtime.run_options import RunOptions
from moe_tool.runtime.session import Session, load_session
from moe_tool.text.sequences import TokenSequences, build_sequences
from moe_tool.text.sources import TextSource
from moe_tool.tuning.blend_routers import Blend, Routers, choose_blend
from moe_tool.tuning.judge_pruning import Verdict, judge_pruning
from moe_tool.tuning.masked_experts import MaskedExperts
from moe_tool.tuning.pruning_memory import training_bytes, verdict_bytes
from moe_tool.tuning.train_mask_router import MaskTraining, TrainingPlan, ratio_routers

_STATE = ".pruning-training.safetensors"
_SAVE_EVERY_S = 20.0
_HELD_OUT = 0.125
_MIN_SEQ_LEN = 3
"""Tokens of the shortest sequence: a prompt, and two predicted tokens"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TunePruningOptions:
    """Options of `tune pruning`."""

    rate: float = 0.2
    """Share of the chosen experts to drop"""
    tokens: int = 131072
    """Tokens of text, all domains together; an eighth is held out"""
    seq_len: int = 256
    """Tokens per sequence, capped at the model's maximum"""
    batch: int = 8
    """Sequences per step"""
    memory: MemoryRequest | None = None
    """Budget of the process; None: free memory less a margin"""
    seed: int = 0
    """Seed of the choice of text and of every draw"""
    threads: int | None = None
    offline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TunePruningReport:
    """Trained routers, and their quality on held-out text."""

    bundle: str
    file: str
    rate: float
    """Wanted share of dropped experts among the chosen"""
    left_out: float
    """Share of the chosen experts dropped on held-out text"""
    kl: Estimate
    """KL(exact || pruned) on held-out text, nats per token"""
    kl_by_ratio: float
    """KL of MC's rule at the same rate, which drops each layer's slots of the lowest ratio to the
    heaviest"""
    left_out_by_layer: dict[int, float]
    """Share of the chosen experts dropped, by layer"""
    kept: float
    """Share of the way from the routers' start to the trained ones that is kept, chosen on other
    held-out text; 0: training did not help, and the start is kept"""
    kept_to_start: float
    """KL of what is kept over that of the start, on the text that `kept` was chosen on"""
    steps: int
    tokens: int
    held_out_tokens: int
    penalty: float
    memory_budget_bytes: int
    peak_rss_bytes: int
    seconds: float


def tune_pruning(
    folder: Path,
    sources: Sequence[TextSource],
    options: TunePruningOptions,
    *,
    progress: Progress = SILENT,
) -> TunePruningReport:
    """Train a bundle's mask routers and add them to it; nothing else of it changes.

    The teacher is the bundle with every expert computed. The loss is the divergence from its
    predictions plus a penalty on every kept expert, adapted until the dropped share is the wanted
    one. Experts and skeleton are fixed, in memory as far as the budget allows. An interrupted
    training is resumed.

    Source: MC#, arXiv:2510.10962. Deviations: the patterns are "the j heaviest", the routers also
    see gate weights and expert ids, only as much of the training is kept as held-out text says
    (none of it where it does harm), and thresholds of the slot scores, one for all layers, are
    tabulated afterwards on held-out text, so that any rate can be chosen at run time.

    Raises:
        UnsupportedModelError: the model has one expert per token.
        UsageError: the rate is out of range, or the text too short.
        BudgetError: the memory budget is too small.
        DataSourceError, NotFoundError: the text cannot be read.
        CorruptArtifactError, StorageError: the bundle or the saved training is damaged.
    """
    start = time.perf_counter()
    with BundleReader.open(folder) as bundle:
        manifest = bundle.manifest
        _require_whole(folder, manifest)
        share = _share_of_light(options.rate, manifest.shape)
        text = _text(folder, sources, options, vocabulary=manifest.shape.vocabulary)
        plan, held_out = _split(text, options, share)
        with _open(bundle, options, held_out, progress) as session:
            training, blend, verdict = _train_and_judge(
                session, folder, options, plan, held_out, progress
            )
            budget_bytes = session.plan.memory.budget_bytes
    learned = _write(
        folder, manifest, options, training, blend.routers, verdict, plan, text.sources
    )
    most = (manifest.shape.top_k - 1) / manifest.shape.top_k
    return TunePruningReport(
        bundle=str(folder),
        file=learned.file,
        rate=options.rate,
        left_out=most * float(np.mean(list(verdict.left_out.values()))),
        kl=Estimate(value=learned.quality.kl, ci95=learned.quality.kl_ci95),
        kl_by_ratio=float(verdict.kl_by_ratio.mean()),
        left_out_by_layer={layer: most * each for layer, each in verdict.left_out.items()},
        kept=blend.share,
        kept_to_start=blend.to_start,
        steps=plan.n_steps,
        tokens=plan.ids.numel(),
        held_out_tokens=held_out.numel(),
        penalty=learned.penalty,
        memory_budget_bytes=budget_bytes,
        peak_rss_bytes=peak_rss_bytes(),
        seconds=time.perf_counter() - start,
    )


def _split(
    text: TokenSequences, options: TunePruningOptions, share: float
) -> tuple[TrainingPlan, torch.Tensor]:
    """Return the training plan, and the held-out sequences [n, S]."""
    ids = torch.from_numpy(text.ids.astype(np.int64))  # [N, S]
    plan = TrainingPlan(
        share=share,
        ids=ids[torch.from_numpy(~text.held_out)],
        batch=options.batch,
        seed=options.seed,
    )
    return plan, ids[torch.from_numpy(text.held_out)]


def _train_and_judge(
    session: Session,
    folder: Path,
    options: TunePruningOptions,
    plan: TrainingPlan,
    held_out: torch.Tensor,
    progress: Progress,
) -> tuple[MaskTraining, Blend, Verdict]:
    """Train on the plan's text; choose on one half of the held-out text, judge on the other."""
    experts = MaskedExperts(session=session)
    session.skeleton.set_experts_function(experts)
    shape = session.manifest.shape
    order = _order(session.manifest, plan, options)
    with keeping((folder / _STATE).is_file):
        training = _train(folder, experts, plan, order, progress)
    # Every second sequence: they are in order of their domains.
    chosen_by, judged_by = held_out[::2], held_out[1::2] if len(held_out) > 1 else held_out
    blend = choose_blend(
        experts,
        ratio_routers(shape),
        {layer: router.frozen() for layer, router in training.routers.items()},
        chosen_by,
        share=plan.share,
        micro_batch=session.plan.workload.batch,
        progress=progress,
    )
    verdict = judge_pruning(
        experts,
        blend.routers,
        shape,
        judged_by,
        share=plan.share,
        micro_batch=session.plan.workload.batch,
        progress=progress,
    )
    return training, blend, verdict


def _write(
    folder: Path,
    manifest: BundleManifest,
    options: TunePruningOptions,
    training: MaskTraining,
    routers: Routers,
    verdict: Verdict,
    plan: TrainingPlan,
    sources: tuple[str, ...],
) -> LearnedPruning:
    """Add the routers to the bundle and remove the state of the training."""
    learned = LearnedPruning(
        file=f"pruning-{0:016x}.safetensors",  # named by its hash when it is written
        rate=options.rate,
        offsets=tuple(float(offset) for offset in verdict.offsets),
        penalty=training.penalty_per_slot,
        quality=verdict.quality(options.seed),
        tokens=plan.ids.numel(),
        seed=options.seed,
        sources=sources,
    )
    router = {layer: each.to_arrays() for layer, each in routers.items()}
    written = write_mask_router(folder, manifest, router, learned)
    with storage_errors(folder):
        (folder / _STATE).unlink(missing_ok=True)
    assert written.pruning is not None
    return written.pruning


def _require_whole(folder: Path, manifest: BundleManifest) -> None:
    if manifest.selectors:
        raise UsageError(
            f"the experts of {folder} are stored in channels, which cannot be trained through",
            hint="tune a bundle that was packed without --sparse-experts",
        )
    if manifest.removed:
        raise UsageError(
            f"{folder} lacks {len(manifest.removed)} experts: mask routers need all of them",
            hint="pack one with --bits, or with a plan that removes none",
        )


def _share_of_light(rate: float, shape: MoeShape) -> float:
    """Convert a share of all slots to a share of the slots after the heaviest."""
    if shape.top_k < 2:
        raise UnsupportedModelError(
            "this model has one expert per token, so none can be pruned",
            hint="moe-tool tune weights lowers the loss of few bits",
        )
    most = (shape.top_k - 1) / shape.top_k
    if not 0 < rate < most:
        raise UsageError(
            f"--rate {rate:g}: not possible with {shape.top_k} experts per token",
            hint=f"above 0 and below {most:g}, e.g. 0.2",
        )
    return rate / most


def _text(
    folder: Path, sources: Sequence[TextSource], options: TunePruningOptions, *, vocabulary: int
) -> TokenSequences:
    longest = context_length(read_config(folder).get_text_config())
    seq_len = min(options.seq_len, longest or options.seq_len)
    if seq_len < _MIN_SEQ_LEN:
        raise UsageError(f"--seq-len {seq_len}: at least {_MIN_SEQ_LEN} is needed")
    text = build_sequences(
        sources,
        load_tokenizer(folder),
        vocabulary=vocabulary,
        n_tokens=options.tokens,
        seq_len=seq_len,
        holdout=_HELD_OUT,
        seed=options.seed,
        offline=options.offline,
    )
    if text.held_out.all() or not text.held_out.any():
        raise DataSourceError(
            f"{len(text.ids)} sequences of {seq_len} tokens are too few to train on and judge by",
            hint="more --tokens, more text or a smaller --seq-len",
        )
    return text


def _open(
    bundle: BundleReader, options: TunePruningOptions, held_out: torch.Tensor, progress: Progress
) -> Session:
    """Open the session with as many sequences per forward as the budget allows."""
    manifest = bundle.manifest
    config = read_config(bundle.folder).get_text_config()
    seq_len = held_out.shape[1]
    run = RunOptions(
        # The plan's budget is not used: it is for a run, and training needs more memory.
        memory=options.memory or AUTO,
        policy=EXACT_POLICY,
        residency="cache",
        seed=options.seed,
        threads=options.threads,
        context=seq_len,
        prompt_tokens=seq_len,
    )
    beside = verdict_bytes(manifest.shape, n_tokens=held_out.numel())
    beside += divergence_scratch_bytes(manifest.shape.vocabulary)
    micro_batch = options.batch
    while True:
        taken = training_bytes(config, manifest.shape, batch=micro_batch, seq_len=seq_len)
        asked = replace(run, batch=micro_batch, caller_bytes=taken + beside)
        try:
            return load_session(bundle, asked, progress=progress)
        except BudgetError:
            if micro_batch == 1:
                raise
            micro_batch //= 2


def _order(manifest: BundleManifest, plan: TrainingPlan, options: TunePruningOptions) -> bytes:
    """Return a digest of the training's inputs; a state of another one is not resumed."""
    weights = manifest.model_dump_json(include={"identity", "forms", "removed", "skeleton"})
    return order_digest(
        {
            "bundle": hashlib.sha256(weights.encode()).hexdigest(),
            "ids": hashlib.sha256(plan.ids.numpy().tobytes()).hexdigest(),
            "shape": list(plan.ids.shape),
            "rate": options.rate,
            "batch": plan.batch,
            "seed": plan.seed,
        }
    )


def _train(
    folder: Path, experts: MaskedExperts, plan: TrainingPlan, order: bytes, progress: Progress
) -> MaskTraining:
    session = experts.session
    micro_batch = session.plan.workload.batch
    training = MaskTraining(session.manifest.shape, plan)
    path = folder / _STATE
    reached = read_training_state(path, order, training.state(), n_steps=plan.n_steps)
    if reached is None:
        training.begin(experts, micro_batch=micro_batch)
    else:
        training.restore(reached.tensors, step=reached.step, penalty=reached.penalty)
        progress.note(f"resumed after step {reached.step} of {plan.n_steps}")
    progress.begin("train", plan.n_steps, "steps")
    progress.advance(training.step)
    saved_at = time.perf_counter()
    while training.step < plan.n_steps:
        training.advance(experts, micro_batch=micro_batch)
        progress.advance()
        if time.perf_counter() - saved_at > _SAVE_EVERY_S or training.step == plan.n_steps:
            assert training.penalty is not None
            state = TrainingState(
                step=training.step, penalty=training.penalty, tensors=training.state()
            )
            write_training_state(path, order, state)
            saved_at = time.perf_counter()
    progress.end()
    return training
