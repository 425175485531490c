"""Add text to a profile: record the new sequences alone, then merge both recordings."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from moe_tool import __version__
from moe_tool.artifacts.expert_statistics import ExpertStatistics
from moe_tool.artifacts.identity import require_same_model
from moe_tool.artifacts.router_trace import LayerTrace, TracedTokens
from moe_tool.errors import UsageError
from moe_tool.formats.profile_hdf5 import ProfileHeader, ProfileReader, write_measured_profile
from moe_tool.kept_work import keeping
from moe_tool.models.architecture import OpenedModel, open_model
from moe_tool.models.locate import LocatedModel
from moe_tool.models.tokenizer import load_tokenizer, tokenizer_sha256
from moe_tool.profiling.merged_statistics import merge_statistics
from moe_tool.profiling.parts_folder import PartsFolder
from moe_tool.profiling.profile_pass import ProfilePass
from moe_tool.profiling.recorder import (
    AddedText,
    ProfileReport,
    profile_header,
    report_profile,
)
from moe_tool.profiling.similarity import router_similarity
from moe_tool.progress import SILENT, Progress
from moe_tool.text.sequences import TokenSequences, build_sequences
from moe_tool.text.sources import TextSource

_REMEDY = "name its own model, or record a new profile with --data and all text"


def add_to_profile(
    model: LocatedModel,
    sources: Sequence[TextSource],
    *,
    out: Path,
    tokens: int = 65536,
    memory_bytes: int | None = None,
    resume: bool = False,
    offline: bool = False,
    progress: Progress = SILENT,
) -> ProfileReport:
    """Record new text and merge it into the profile at `out`, which is replaced at the very end.

    Sequence length, held-out share and seed are the profile's. A domain that the profile has grows
    by the new text. Parts of an unfinished addition are in `<out>.add.parts/`.

    Args:
        tokens: number of new tokens, all new sources together.
        memory_bytes, resume, offline: as `record_profile`.

    Raises:
        NotFoundError, CorruptArtifactError, ArtifactVersionError: no intact profile at `out`.
        WrongModelError: it is of another model.
        UsageError: it is of another tokenizer, or has one of the texts already.
        The others of `record_profile`.
    """
    start = time.perf_counter()
    with ProfileReader.open(out) as old:
        opened = open_model(model)
        for warning in opened.warnings:
            progress.note(warning)
        parts = PartsFolder(out.with_name(f"{out.name}.add"))
        with opened.checkpoint, keeping(parts.has_layers):
            _require_addable(out, old.header, opened, model)
            sequences = build_sequences(
                sources,
                load_tokenizer(model.tokenizer_folder),
                vocabulary=opened.shape.vocabulary,
                n_tokens=tokens,
                seq_len=old.header.seq_len,
                holdout=old.header.holdout,
                seed=old.header.seed,
                offline=offline,
                progress=progress,
            )
            _require_new_text(old, sequences)
            header = profile_header(opened, model, sequences, holdout=old.header.holdout)
            parts.open(header, sequences, resume=resume)
            run = ProfilePass(opened, model.folder, sequences, parts, memory_bytes, progress)
            first_layer = run.record_layers(resume=resume)
            recorded = parts.folder / "added.h5"
            run.write(recorded, header)
            with ProfileReader.open(recorded) as new:
                merge_profiles(old, new, out)
            parts.remove()
    report = report_profile(
        out, opened, run.plan.memory_bytes, first_layer or None, start, progress
    )
    return _with_added(report, sequences)


def _with_added(report: ProfileReport, sequences: TokenSequences) -> ProfileReport:
    added = AddedText(
        tokens=sequences.ids.size,
        held_out_tokens=int(sequences.held_out.sum()) * sequences.ids.shape[1],
        sources=sequences.sources,
        domains=sequences.domains,
    )
    return replace(report, added=added, tokens_per_second=added.tokens / report.seconds)


def merge_profiles(old: ProfileReader, new: ProfileReader, out: Path) -> None:
    """Write both recordings as one profile atomically, with one layer in memory at a time.

    Args:
        out: may be the path of `old`.

    Raises:
        WrongModelError: their weights differ.
    """
    require_same_model(
        old.header.identity, new.header.identity, artifact=f"the profile {old.path}", remedy=_REMEDY
    )
    tokens, index = _merge_tokens(old.tokens, new.tokens)
    header = old.header.model_copy(
        update={
            "identity": new.header.identity,  # its full hash has just been computed
            "sources": old.header.sources + new.header.sources,
            "tool_version": __version__,
        }
    )

    def layers() -> Iterator[tuple[int, LayerTrace, ExpertStatistics]]:
        in_sample = np.repeat(~tokens.held_out, tokens.ids.shape[1])  # [T]
        for layer in old.layers:
            trace = _concatenated(old.trace(layer), new.trace(layer))
            statistics = merge_statistics(
                old.statistics(layer),
                new.statistics(layer),
                domains=(np.arange(len(old.tokens.domains)), index),
                n_domains=len(tokens.domains),
                router_similarity=router_similarity(trace.router_logits[in_sample]),
            )
            yield layer, trace, statistics

    write_measured_profile(out, header, tokens, layers())


def _merge_tokens(old: TracedTokens, new: TracedTokens) -> tuple[TracedTokens, np.ndarray]:
    """Return the tokens of both, and the index of each new domain among the merged ones."""
    domains = old.domains + tuple(name for name in new.domains if name not in old.domains)
    index = np.array([domains.index(name) for name in new.domains], np.int16)
    first = int(old.document.max()) + 1 if old.document.size else 0
    merged = TracedTokens(
        ids=np.concatenate([old.ids, new.ids]),
        domain=np.concatenate([old.domain, index[new.domain]]),
        document=np.concatenate([old.document, new.document + np.int32(first)]),
        held_out=np.concatenate([old.held_out, new.held_out]),
        domains=domains,
    )
    return merged, index


def _concatenated(old: LayerTrace, new: LayerTrace) -> LayerTrace:
    score = None
    if old.selection_score is not None and new.selection_score is not None:
        score = np.concatenate([old.selection_score, new.selection_score])
    return LayerTrace(
        top_k_index=np.concatenate([old.top_k_index, new.top_k_index]),
        top_k_weight=np.concatenate([old.top_k_weight, new.top_k_weight]),
        router_logits=np.concatenate([old.router_logits, new.router_logits]),
        selection_score=score,
        next_gate_index=np.concatenate([old.next_gate_index, new.next_gate_index], axis=1),
    )


def _require_addable(
    out: Path, header: ProfileHeader, opened: OpenedModel, model: LocatedModel
) -> None:
    require_same_model(
        header.identity, opened.identity, artifact=f"the profile {out}", remedy=_REMEDY
    )
    tokenizer = tokenizer_sha256(model.tokenizer_folder)
    if header.shape != opened.shape or header.tokenizer_sha256 != tokenizer:
        raise UsageError(
            f"{out} was recorded with another tokenizer or shape of this model",
            hint=_REMEDY,
        )


def _require_new_text(old: ProfileReader, sequences: TokenSequences) -> None:
    """Refuse a text whose first sequence is in the profile: a text's sequences are its first ones,
    whatever name or path it is given by."""
    ids = old.tokens.ids
    firsts = np.unique(sequences.domain, return_index=True)[1]  # [sources], in their order
    for source, first in zip(sequences.sources, firsts, strict=True):
        if (ids == sequences.ids[first]).all(axis=1).any():
            raise UsageError(
                f"{old.path} has the text {source} already",
                hint="name other text with --add; the same text twice would count double",
            )
