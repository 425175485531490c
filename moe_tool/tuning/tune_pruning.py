"""The story of `tune pruning`: routers learn which of a token's experts are not worth it, and what
that costs is measured on text that was kept apart."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from moe_tool.artifacts.bundle_manifest import (
    N_QUANTILES,
    BundleManifest,
    LearnedPruning,
    QualityFigure,
)
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.available_memory import peak_rss_bytes
from moe_tool.errors import BudgetError, DataSourceError, UnsupportedModelError, UsageError
from moe_tool.evaluation.bootstrap import bootstrap_interval
from moe_tool.evaluation.divergence import compare_logits, divergence_scratch_bytes
from moe_tool.formats.atomic_write import storage_errors
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.mask_router_file import write_mask_router
from moe_tool.formats.training_state import (
    TrainingState,
    order_digest,
    read_training_state,
    write_training_state,
)
from moe_tool.models.model_config import read_config
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.policies.misses.prune_learned import rate_offsets
from moe_tool.progress import SILENT, Progress
from moe_tool.runtime.mask_scores import MaskTensors
from moe_tool.runtime.policy_choice import EXACT
from moe_tool.runtime.run_options import RunOptions
from moe_tool.runtime.session import Session, open_session
from moe_tool.text.sequences import TokenSequences, build_sequences
from moe_tool.text.sources import TextSource
from moe_tool.tuning.masked_experts import ChooseMask, MaskedExperts
from moe_tool.tuning.pruning_memory import training_bytes, verdict_bytes
from moe_tool.tuning.train_mask_router import (
    MaskTraining,
    TrainingPlan,
    ratio_routers,
    router_mask,
    watch_worth,
)

_STATE = ".pruning-training.safetensors"
_SAVE_EVERY_S = 20.0
_HELD_OUT = 0.125
_MIN_SEQ_LEN = 3
"""A prompt, and two tokens that are predicted"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TunePruningOptions:
    """What is trained for, and on how much text."""

    rate: float = 0.2
    """Share of the chosen experts to be left out"""
    tokens: int = 131072
    """Of text, all domains together; an eighth is kept apart"""
    seq_len: int = 256
    """Capped at what the model was made for"""
    batch: int = 8
    """Sequences of a step"""
    memory: str | None = None
    seed: int = 0
    """Of the choice of text and of every draw"""
    threads: int | None = None
    offline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TunePruningReport:
    """What was learned, and what it is worth on text that was kept apart."""

    bundle: str
    file: str
    rate: float
    """Wanted"""
    left_out: float
    """Share of the chosen experts that was left out of the held-out text"""
    kl: float
    """Nats per token: KL(exact || pruned) there"""
    kl_ci95: tuple[float, float]
    kl_by_ratio: float
    """Of MC's rule at the same rate: each layer's slots that are lightest beside the heaviest"""
    left_out_by_layer: dict[int, float]
    """Share of the chosen experts"""
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
    shape = manifest.shape
    share = _share_of_light(options.rate, shape)
    text = _text(folder, sources, options)
    ids = torch.from_numpy(text.ids.astype(np.int64))  # [N, S]
    held_out = ids[torch.from_numpy(text.held_out)]
    plan = TrainingPlan(
        share=share,
        ids=ids[torch.from_numpy(~text.held_out)],
        batch=options.batch,
        seed=options.seed,
    )
    with _open(folder, options, manifest, plan, held_out, progress) as session:
        experts = MaskedExperts(session=session)
        session.skeleton.set_experts_function(experts)
        training = _train(folder, experts, plan, _order(manifest, plan, options), progress)
        judged = _judge(experts, training, share, held_out, progress)
        budget_bytes, _ = session.plan.budget_bytes, session.close
    learned = LearnedPruning(
        file="to-be-named",
        rate=options.rate,
        offsets=tuple(float(offset) for offset in judged.offsets),
        penalty=training.penalty_per_slot,
        quality=judged.quality(options.seed),
        tokens=plan.ids.numel(),
        seed=options.seed,
        sources=text.sources,
    )
    router = {layer: each.to_arrays() for layer, each in training.routers.items()}
    written = write_mask_router(folder, manifest, router, learned)
    with storage_errors(folder):
        (folder / _STATE).unlink(missing_ok=True)
    assert written.pruning is not None
    most = (shape.top_k - 1) / shape.top_k
    return TunePruningReport(
        bundle=str(folder),
        file=written.pruning.file,
        rate=options.rate,
        left_out=most * float(np.mean(list(judged.left_out.values()))),
        kl=written.pruning.quality.kl,
        kl_ci95=written.pruning.quality.kl_ci95,
        kl_by_ratio=float(judged.kl_by_ratio.mean()),
        left_out_by_layer={layer: most * each for layer, each in judged.left_out.items()},
        steps=plan.n_steps,
        tokens=plan.ids.numel(),
        held_out_tokens=held_out.numel(),
        penalty=written.pruning.penalty,
        memory_budget_bytes=budget_bytes,
        peak_rss_bytes=peak_rss_bytes(),
        seconds=time.perf_counter() - start,
    )
