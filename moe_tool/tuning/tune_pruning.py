"""The story of `tune pruning`: routers learn which of a token's experts are not worth it, and what
that costs is measured on text that was kept apart."""

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
"""A prompt, and two tokens that are predicted"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TunePruningOptions:
    """Goal of the training, and its text."""

    rate: float = 0.2
    """Share of the chosen experts to be left out"""
    tokens: int = 131072
    """Tokens of text, all domains together; an eighth is kept apart"""
    seq_len: int = 256
    """Capped at what the model was made for"""
    batch: int = 8
    """Sequences of a step"""
    memory: MemoryRequest | None = None
    """Budget of the process; None: what is free less a margin"""
    seed: int = 0
    """Seeds the choice of text and every draw"""
    threads: int | None = None
    offline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TunePruningReport:
    """Trained routers, and their worth on text that was kept apart."""

    bundle: str
    file: str
    rate: float
    """Share of the chosen experts that was to be left out"""
    left_out: float
    """Share of the chosen experts that was left out of the held-out text"""
    kl: Estimate
    """KL(exact || pruned) there, nats per token"""
    kl_by_ratio: float
    """KL of MC's rule at the same rate: each layer's slots that are lightest beside the heaviest"""
    left_out_by_layer: dict[int, float]
    """Share of the chosen experts, by layer"""
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
    """Train a bundle's mask routers and put them into it; nothing else of it changes.

    The teacher is the bundle itself with every expert answering, the loss the divergence of its
    predictions, plus a price on every expert that is kept: it follows the share that is left out
    until that is the wanted one. Experts and skeleton stay as they are, in memory as far as the
    budget has room for them. A training that was interrupted goes on where it was.

    Source: MC#, arXiv:2510.10962. Deviations: the patterns are "the j heaviest", the routers also
    see gate weights and experts, and what a slot has to be worth is set afterwards on held-out
    text, by one number for all layers: so each rate can be asked for at run time.

    Args:
        folder: of the bundle.
        sources: the text, one domain each.
        options: rate, text, memory.
        progress: told about every step.

    Raises:
        UnsupportedModelError: the model has one expert per token.
        UsageError: a rate that cannot be, or too little text.
        BudgetError: the memory budget does not suffice.
        DataSourceError, NotFoundError: the text.
        CorruptArtifactError, StorageError: the bundle, or what is left of an earlier training.
    """
    start = time.perf_counter()
    with BundleReader.open(folder) as bundle:
        manifest = bundle.manifest
    _require_whole(folder, manifest)
    share = _share_of_light(options.rate, manifest.shape)
    text = _text(folder, sources, options, vocabulary=manifest.shape.vocabulary)
    plan, held_out = _split(text, options, share)
    opened = _open(folder, options, manifest, n_held_out=held_out.numel(), progress=progress)
    with opened as session:
        training, verdict = _train_and_judge(session, folder, options, plan, held_out, progress)
        budget_bytes = session.plan.memory.budget_bytes
    learned = _write(folder, manifest, options, training, verdict, plan, text.sources)
    most = (manifest.shape.top_k - 1) / manifest.shape.top_k
    return TunePruningReport(
        bundle=str(folder),
        file=learned.file,
        rate=options.rate,
        left_out=most * float(np.mean(list(verdict.left_out.values()))),
        kl=Estimate(value=learned.quality.kl, ci95=learned.quality.kl_ci95),
        kl_by_ratio=float(verdict.kl_by_ratio.mean()),
        left_out_by_layer={layer: most * each for layer, each in verdict.left_out.items()},
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
    """Return what is trained on, and the sequences to judge by, [n, S]."""
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
) -> tuple[MaskTraining, Verdict]:
    experts = MaskedExperts(session=session)
    session.skeleton.set_experts_function(experts)
    order = _order(session.manifest, plan, options)
    training = _train(folder, experts, plan, order, progress)
    verdict = judge_pruning(
        experts,
        {layer: router.frozen() for layer, router in training.routers.items()},
        session.manifest.shape,
        held_out,
        share=plan.share,
        micro_batch=session.plan.workload.batch,
        progress=progress,
    )
    return training, verdict


def _write(
    folder: Path,
    manifest: BundleManifest,
    options: TunePruningOptions,
    training: MaskTraining,
    verdict: Verdict,
    plan: TrainingPlan,
    sources: tuple[str, ...],
) -> LearnedPruning:
    """Put the routers into the bundle, and remove the state of the training."""
    learned = LearnedPruning(
        file="to-be-named",
        rate=options.rate,
        offsets=tuple(float(offset) for offset in verdict.offsets),
        penalty=training.penalty_per_slot,
        quality=verdict.quality(options.seed),
        tokens=plan.ids.numel(),
        seed=options.seed,
        sources=sources,
    )
    router = {layer: each.to_arrays() for layer, each in training.routers.items()}
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
            "this model has one expert per token, so nothing of it can be pruned",
            hint="moe-tool tune weights lowers what few bits cost",
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
    folder: Path,
    options: TunePruningOptions,
    manifest: BundleManifest,
    *,
    n_held_out: int,
    progress: Progress,
) -> Session:
    """Open the session with as many sequences in a forward as the budget allows."""
    config = read_config(folder).get_text_config()
    longest = context_length(config)
    seq_len = min(options.seq_len, longest or options.seq_len)
    run = RunOptions(
        # Not the plan's: it was made for running, and training takes more.
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
    """Return a digest of what decides a training: another one does not go on with its state."""
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
