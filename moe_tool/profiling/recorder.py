"""Record a profile: router traces and expert statistics of a checkpoint on calibration text."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_tool import __version__
from moe_tool.artifacts.routing_report import ProfileRouting
from moe_tool.available_memory import peak_rss_bytes
from moe_tool.errors import UsageError
from moe_tool.formats.claimed_artifact import require_unclaimed
from moe_tool.formats.profile_hdf5 import ProfileHeader, ProfileReader
from moe_tool.kept_work import keeping
from moe_tool.models.architecture import OpenedModel, open_model
from moe_tool.models.locate import LocatedModel
from moe_tool.models.skeleton_facts import skeleton_facts
from moe_tool.models.tokenizer import load_tokenizer, tokenizer_sha256
from moe_tool.profiling.coverage import layer_coverages
from moe_tool.profiling.parts_folder import PartsFolder
from moe_tool.profiling.profile_pass import ProfilePass
from moe_tool.profiling.routing_report import report_routing
from moe_tool.progress import SILENT, Progress
from moe_tool.text.sequences import TokenSequences, build_sequences
from moe_tool.text.sources import TextSource


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedText:
    """Text that was added to a profile."""

    tokens: int
    held_out_tokens: int
    sources: tuple[str, ...]
    domains: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileReport:
    """Figures of a finished profile, as `moe-tool profile` shows them."""

    profile: Path
    tokens: int
    layers: int
    experts: int
    top_k: int
    bytes_read: int
    """Tensor bytes read from the checkpoint by this run"""
    checkpoint_bytes: int
    profile_bytes: int
    seconds: float
    tokens_per_second: float
    peak_rss_bytes: int
    memory_budget_bytes: int
    resumed_at_layer: int | None
    domains: tuple[str, ...]
    routing: ProfileRouting
    added: AddedText | None = None
    """Text that this run added to an existing profile; the other figures are the whole's"""


def record_profile(
    model: LocatedModel,
    sources: Sequence[TextSource],
    *,
    out: Path,
    tokens: int = 65536,
    seq_len: int = 512,
    holdout: float = 0.25,
    seed: int = 0,
    memory_bytes: int | None = None,
    resume: bool = False,
    may_replace: bool = True,
    offline: bool = False,
    progress: Progress = SILENT,
) -> ProfileReport:
    """Record router traces and expert statistics, with one decoder layer in memory at a time.

    Args:
        sources: calibration text by domain.
        out: the profile's HDF5 file; parts of an unfinished one are in `<out>.parts/`.
        tokens: number of tokens, all domains together.
        seq_len: tokens per sequence; cut to the model's number of positions.
        holdout: share of the sequences held out to check figures measured on the others.
        seed: seed of the choice of text, of the held-out part and of the probe's sample.
        memory_bytes: budget of the whole process; None: 80 % of what is free.
        resume: continue an interrupted run with the same arguments.
        may_replace: whether `out` may replace another model's profile.

    Raises:
        NotFoundError, DataSourceError, UnsupportedModelError, CorruptArtifactError: model or text.
        BudgetError: one layer does not fit the budget.
        UsageError: `resume` with other arguments, or another model's profile is in the way.
    """
    start = time.perf_counter()
    _check_arguments(out, tokens=tokens, seq_len=seq_len, holdout=holdout)
    opened = _open(model, None if may_replace else out, progress)
    parts = PartsFolder(out)
    with opened.checkpoint, keeping(parts.has_layers):
        sequences = build_sequences(
            sources,
            load_tokenizer(model.tokenizer_folder),
            vocabulary=opened.shape.vocabulary,
            n_tokens=tokens,
            seq_len=min(seq_len, opened.max_positions),
            holdout=holdout,
            seed=seed,
            offline=offline,
            progress=progress,
        )
        header = profile_header(opened, model, sequences, holdout=holdout)
        parts.open(header, sequences, resume=resume)
        run = ProfilePass(opened, model.folder, sequences, parts, memory_bytes, progress)
        first_layer = run.record_layers(resume=resume)
        run.write(out, header)
        parts.remove()
    return report_profile(out, opened, run.plan.memory_bytes, first_layer or None, start, progress)


def _open(model: LocatedModel, unclaimed: Path | None, progress: Progress) -> OpenedModel:
    """Open a model, and refuse to replace another model's profile at `unclaimed`."""
    opened = open_model(model)
    for warning in opened.warnings:
        progress.note(warning)
    if unclaimed is not None:
        require_unclaimed(unclaimed, opened.identity)
    return opened


def _check_arguments(out: Path, *, tokens: int, seq_len: int, holdout: float) -> None:
    if tokens < 2 or seq_len < 2:
        raise UsageError(f"--tokens {tokens} --seq-len {seq_len}: both must be at least 2")
    if not 0.0 < holdout <= 0.5:
        raise UsageError(
            f"--holdout {holdout} must lie above 0 and at most at 0.5",
            hint="every number that a plan relies on is checked on the held-out part",
        )
    if out.is_dir():
        raise UsageError(f"{out} is a folder", hint="name a file: --out profiles/NAME.h5")


def profile_header(
    opened: OpenedModel, model: LocatedModel, sequences: TokenSequences, *, holdout: float
) -> ProfileHeader:
    """Return the header of a recording."""
    return ProfileHeader(
        identity=opened.identity,
        shape=opened.shape,
        tokenizer_sha256=tokenizer_sha256(model.tokenizer_folder),
        sources=sequences.sources,
        seed=sequences.seed,
        seq_len=sequences.ids.shape[1],
        holdout=holdout,
        tool_version=__version__,
        skeleton=skeleton_facts(opened, model.folder),
        kept=opened.kept_precision(),
    )


def report_profile(
    out: Path,
    opened: OpenedModel,
    memory_budget_bytes: int,
    resumed_at_layer: int | None,
    start: float,
    progress: Progress,
) -> ProfileReport:
    """Return the figures of a profile, read back from its file."""
    with ProfileReader.open(out) as profile:
        coverage = layer_coverages(profile)
        routing = report_routing(profile, progress)
        n_tokens, domains = profile.tokens.ids.size, profile.tokens.domains
    seconds = time.perf_counter() - start
    return ProfileReport(
        profile=out,
        tokens=n_tokens,
        layers=len(opened.shape.layers),
        experts=opened.shape.experts,
        top_k=opened.shape.top_k,
        bytes_read=opened.checkpoint.bytes_read,
        checkpoint_bytes=opened.checkpoint.total_bytes,
        profile_bytes=out.stat().st_size,
        seconds=seconds,
        tokens_per_second=n_tokens / seconds,
        peak_rss_bytes=peak_rss_bytes(),
        memory_budget_bytes=memory_budget_bytes,
        resumed_at_layer=resumed_at_layer,
        domains=domains,
        routing=ProfileRouting(coverage=coverage, routing=routing),
    )
