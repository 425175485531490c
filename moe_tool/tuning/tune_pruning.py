"""Train mask routers that decide which of a token's experts to skip; measure the cost held-out.

Source: MC#, arXiv:2510.10962. Deviations: patterns are "the j heaviest", routers also see gate
weights and expert ids, and one threshold for all layers is set afterwards on held-out text, so that
any rate can be asked for at run time.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.artifacts.bundle_sections import LearnedPruning
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
from moe_tool.models.context_length import context_length
from moe_tool.models.model_config import read_config
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.progress import SILENT, Progress
from moe_tool.runtime.run_options import EXACT_POLICY, RunOptions
from moe_tool.runtime.session import Session, open_session
from moe_tool.text.sequences import TokenSequences, build_sequences
from moe_tool.text.sources import TextSource
from moe_tool.tuning.judge_pruning import Verdict, judge_pruning
from moe_tool.tuning.masked_experts import MaskedExperts
from moe_tool.tuning.pruning_memory import training_bytes, verdict_bytes
from moe_tool.tuning.train_mask_router import MaskTraining, TrainingPlan

_STATE = ".pruning-training.safetensors"
_SAVE_EVERY_S = 20.0
_HELD_OUT = 0.125
_MIN_SEQ_LEN = 3
"""Shortest sequence: one token of prompt and two predicted ones"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TunePruningOptions:
    """Options of a training of mask routers."""

    rate: float = 0.2
    """Share of the chosen experts to skip"""
    tokens: int = 131072
    """Tokens of text, all domains together; an eighth is held out"""
    seq_len: int = 256
    """Tokens per sequence; capped at the model's number of positions"""
    batch: int = 8
    """Sequences per step"""
    memory: MemoryRequest | None = None
    """Memory budget of the process; None: free memory less a margin"""
    seed: int = 0
    """Seed of the choice of text and of every draw"""
    threads: int | None = None
    offline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TunePruningReport:
    """Result of a training, with its quality on held-out text."""

    bundle: str
    file: str
    rate: float
    """Share of the chosen experts that was asked to be skipped"""
    left_out: float
    """Share of the chosen experts skipped on the held-out text"""
    kl: float
    """KL(exact || pruned) on the held-out text, nats per token"""
    kl_ci95: tuple[float, float]
    kl_by_ratio: float
    """KL of MC's rule at the same rate: skip the smallest gate weights relative to the largest"""
    left_out_by_layer: dict[int, float]
    """Share of the chosen experts skipped, by decoder layer"""
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

    The teacher is the bundle itself with every expert running. The loss is the KL to the teacher
    plus a price per kept expert, which adapts until the wanted share is skipped.

    Args:
        folder: the bundle.
        sources: text, one domain each.
        options: rate, text, memory.
        progress: told about every step.

    Raises:
        UnsupportedModelError: the model has one expert per token.
        UsageError: an impossible rate, or too little text.
        BudgetError: the memory budget does not suffice.
        DataSourceError, NotFoundError: the text cannot be read.
        CorruptArtifactError, StorageError: the bundle or an earlier training's state is damaged.
    """
    start = time.perf_counter()
    with BundleReader.open(folder) as bundle:
        manifest = bundle.manifest
    _require_whole(folder, manifest)
    share = _share_of_light(options.rate, manifest.shape)
    text = _text(folder, sources, options, manifest.shape.vocabulary, progress)
    ids = torch.from_numpy(text.ids.astype(np.int64))  # [N, S]
    held_out = ids[torch.from_numpy(text.held_out)]
    train = ids[torch.from_numpy(~text.held_out)]
    plan = TrainingPlan(share=share, ids=train, batch=options.batch, seed=options.seed)
    with _open(folder, options, manifest, held_out.numel(), progress) as session:
        experts = MaskedExperts(session=session)
        session.skeleton.set_experts_function(experts)
        training = _train(folder, experts, plan, _order(manifest, plan, options), progress)
        verdict = judge_pruning(
            experts,
            {layer: router.frozen() for layer, router in training.routers.items()},
            manifest.shape,
            held_out,
            share=share,
            micro_batch=session.plan.workload.batch,
            progress=progress,
        )
        budget_bytes = session.plan.memory.budget_bytes
    written = _write(folder, manifest, training, verdict, options.rate, text.sources)
    return _report(
        folder,
        written,
        verdict,
        steps=plan.n_steps,
        held_out_tokens=held_out.numel(),
        memory_budget_bytes=budget_bytes,
        seconds=time.perf_counter() - start,
    )


def _write(
    folder: Path,
    manifest: BundleManifest,
    training: MaskTraining,
    verdict: Verdict,
    rate: float,
    sources: tuple[str, ...],
) -> BundleManifest:
    plan = training.plan
    learned = LearnedPruning(
        file="to-be-named",
        rate=rate,
        offsets=tuple(float(offset) for offset in verdict.offsets),
        penalty=training.penalty_per_slot,
        quality=verdict.quality(plan.seed),
        tokens=plan.ids.numel(),
        seed=plan.seed,
        sources=sources,
    )
    arrays = {layer: each.to_arrays() for layer, each in training.routers.items()}
    written = write_mask_router(folder, manifest, arrays, learned)
    with storage_errors(folder):
        (folder / _STATE).unlink(missing_ok=True)
    return written


def _report(
    folder: Path,
    manifest: BundleManifest,
    verdict: Verdict,
    *,
    steps: int,
    held_out_tokens: int,
    memory_budget_bytes: int,
    seconds: float,
) -> TunePruningReport:
    learned = manifest.pruning
    assert learned is not None
    most = (manifest.shape.top_k - 1) / manifest.shape.top_k
    return TunePruningReport(
        bundle=str(folder),
        file=learned.file,
        rate=learned.rate,
        left_out=most * float(np.mean(list(verdict.left_out.values()))),
        kl=learned.quality.kl,
        kl_ci95=learned.quality.kl_ci95,
        kl_by_ratio=float(verdict.kl_by_ratio.mean()),
        left_out_by_layer={layer: most * each for layer, each in verdict.left_out.items()},
        steps=steps,
        tokens=learned.tokens,
        held_out_tokens=held_out_tokens,
        penalty=learned.penalty,
        memory_budget_bytes=memory_budget_bytes,
        peak_rss_bytes=peak_rss_bytes(),
        seconds=seconds,
    )


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
            "this model has one expert per token, so none can be skipped",
            hint="moe-tool tune weights improves models of few bits instead",
        )
    most = (shape.top_k - 1) / shape.top_k
    if not 0 < rate < most:
        raise UsageError(
            f"--rate {rate:g}: not possible with {shape.top_k} experts per token",
            hint=f"above 0 and below {most:g}, e.g. 0.2",
        )
    return rate / most


def _text(
    folder: Path,
    sources: Sequence[TextSource],
    options: TunePruningOptions,
    vocabulary: int,
    progress: Progress,
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
        progress=progress,
    )
    if text.held_out.all() or not text.held_out.any():
        raise DataSourceError(
            f"{len(text.ids)} sequences of {seq_len} tokens are too few to train on and judge by",
            hint="more --tokens, more text or a smaller --seq-len",
        )
    return text


def _open(
    folder: Path,
    options: TunePruningOptions,
    manifest: BundleManifest,
    n_held_out: int,
    progress: Progress,
) -> Session:
    """Open the session with as many sequences per forward as the budget allows."""
    config = read_config(folder).get_text_config()
    longest = context_length(config)
    seq_len = min(options.seq_len, longest or options.seq_len)
    run = RunOptions(
        # Not the plan's memory: training takes more than running.
        memory=options.memory or AUTO,
        policy=EXACT_POLICY,
        residency="cache",
        seed=options.seed,
        threads=options.threads,
        context=seq_len,
        prompt_tokens=seq_len,
    )
    beside = verdict_bytes(manifest.shape, n_tokens=n_held_out)
    beside += divergence_scratch_bytes(manifest.shape.vocabulary)
    micro_batch = options.batch
    while True:
        taken = training_bytes(config, manifest.shape, batch=micro_batch, seq_len=seq_len)
        asked = replace(run, batch=micro_batch, caller_bytes=taken + beside)
        try:
            return open_session(folder, asked, progress=progress)
        except BudgetError:
            if micro_batch == 1:
                raise
            micro_batch //= 2


def _order(manifest: BundleManifest, plan: TrainingPlan, options: TunePruningOptions) -> bytes:
    """Return a digest of all that decides the outcome, so that only the same training resumes."""
    weights = manifest.model_dump_json(include={"identity", "records", "others", "skeleton"})
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
