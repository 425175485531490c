"""The story of `profile`: one decoder layer in memory, every batch through it, its experts
measured, its part written, the next."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moe_tool import __version__
from moe_tool.artifacts.router_trace import TracedTokens
from moe_tool.artifacts.routing_report import ProfileRouting
from moe_tool.available_memory import peak_rss_bytes
from moe_tool.budget.sizes import format_bytes
from moe_tool.errors import UsageError
from moe_tool.formats.atomic_write import require_free_disk
from moe_tool.formats.claimed_artifact import require_unclaimed
from moe_tool.formats.profile_hdf5 import (
    ProfileHeader,
    ProfileReader,
    read_layer_part,
    write_layer_part,
    write_profile,
)
from moe_tool.models.architecture import OpenedModel, open_model
from moe_tool.models.full_hash import FullHash
from moe_tool.models.layer_stream import LayerStream, StreamedLayer
from moe_tool.models.locate import LocatedModel
from moe_tool.models.output_divergence import total_divergence
from moe_tool.models.skeleton_facts import skeleton_facts
from moe_tool.models.tokenizer import load_tokenizer, tokenizer_sha256
from moe_tool.profiling.coverage import layer_coverage
from moe_tool.profiling.hidden_states import HiddenStates
from moe_tool.profiling.layer_pass import LayerPass, PassPlan
from moe_tool.profiling.profile_memory import LOGIT_ROWS, plan_profile_memory
from moe_tool.profiling.profile_parts import PartsFolder
from moe_tool.profiling.routing_report import report_routing
from moe_tool.profiling.sampled_tokens import sample_rows, watched_sequences
from moe_tool.profiling.sensitivity import sensitivity
from moe_tool.progress import SILENT, Progress
from moe_tool.text.sequences import TokenSequences, build_sequences
from moe_tool.text.sources import TextSource


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileReport:
    """Measurements and costs of `profile`."""

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
    """Record router traces and expert statistics of a checkpoint, one decoder layer in memory at a
    time.

    Args:
        model: where the checkpoint lies.
        sources: calibration text by domain.
        out: the profile's HDF5 file; the parts of an unfinished one are kept in `<out>.parts/`.
        tokens: how many, all domains together.
        seq_len: tokens per sequence; cut to what the model's positions allow.
        holdout: share of the sequences kept apart to check what is measured on the others.
        seed: of the choice of text, of the held-out part and of the probe's sample.
        memory_bytes: budget of the whole process; None: 80 % of what is free.
        resume: go on with the parts of an interrupted run with the same arguments.
        may_replace: whether `out` may be another model's profile: not where nobody chose its name.
        offline: never ask the network for text.
        progress: told about every batch.

    Raises:
        NotFoundError, DataSourceError: model or text are not there.
        UnsupportedModelError, CorruptArtifactError: the checkpoint cannot be read.
        BudgetError: the budget holds not even one layer.
        UsageError: `resume` with other arguments than those of the interrupted run, or another
            model's work is in the way.
    """
    asked = _Asked(
        tokens=tokens,
        seq_len=seq_len,
        holdout=holdout,
        seed=seed,
        memory_bytes=memory_bytes,
        resume=resume,
        may_replace=may_replace,
        offline=offline,
    )
    _check_arguments(asked, out)
    return _record(model, sources, out, asked, progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """Arguments of `record_profile`."""

    tokens: int
    seq_len: int
    holdout: float
    seed: int
    memory_bytes: int | None
    resume: bool
    may_replace: bool
    offline: bool


def _record(
    model: LocatedModel,
    sources: Sequence[TextSource],
    out: Path,
    asked: _Asked,
    progress: Progress,
) -> ProfileReport:
    start = time.perf_counter()
    opened = open_model(model)
    layers = opened.shape.layers
    with opened.checkpoint:
        if not asked.may_replace:
            require_unclaimed(out, opened.identity)
        sequences = _read_text(model, opened, sources, asked)
        header = _header(model, opened, sequences, asked)
        parts = PartsFolder(out)
        parts.open(header, sequences, resume=asked.resume)
        run = _Run(opened, model.folder, sequences, parts, asked, progress)
        first_layer = run.record_layers(resume=asked.resume)
        sensitivities = run.sensitivities()
        identity = opened.identity.model_copy(update={"full": run.full_hash.result()})
        write_profile(
            out,
            header.model_copy(update={"identity": identity}),
            _traced_tokens(sequences),
            parts.layer_files(layers),
            sensitivities,
            sensitivity_n_tokens=run.n_watched,
        )
        coverage = tuple(
            layer_coverage(layer, read_layer_part(parts.layer_file(layer), layer)[1])
            for layer in layers
        )
        parts.remove()
    with ProfileReader.open(out) as profile:
        routing = report_routing(profile, progress)
    seconds = time.perf_counter() - start
    return ProfileReport(
        profile=out,
        tokens=sequences.ids.size,
        layers=len(layers),
        experts=opened.shape.experts,
        top_k=opened.shape.top_k,
        bytes_read=opened.checkpoint.bytes_read,
        checkpoint_bytes=opened.checkpoint.total_bytes,
        profile_bytes=out.stat().st_size,
        seconds=seconds,
        tokens_per_second=sequences.ids.size / seconds,
        peak_rss_bytes=peak_rss_bytes(),
        memory_budget_bytes=run.plan.memory_bytes,
        resumed_at_layer=first_layer or None,
        domains=sequences.domains,
        routing=ProfileRouting(coverage=coverage, routing=routing),
    )


def _read_text(
    model: LocatedModel, opened: OpenedModel, sources: Sequence[TextSource], asked: _Asked
) -> TokenSequences:
    return build_sequences(
        sources,
        load_tokenizer(model.folder),
        vocabulary=opened.shape.vocabulary,
        n_tokens=asked.tokens,
        seq_len=min(asked.seq_len, opened.max_positions),
        holdout=asked.holdout,
        seed=asked.seed,
        offline=asked.offline,
    )


def _header(
    model: LocatedModel, opened: OpenedModel, sequences: TokenSequences, asked: _Asked
) -> ProfileHeader:
    return ProfileHeader(
        identity=opened.identity,
        shape=opened.shape,
        tokenizer_sha256=tokenizer_sha256(model.folder),
        sources=sequences.sources,
        seed=asked.seed,
        seq_len=sequences.ids.shape[1],
        holdout=asked.holdout,
        tool_version=__version__,
        skeleton=skeleton_facts(opened, model.folder),
    )


class _Run:
    """One pass over the layers: batches, the sensitivity's sequences behind them, the store of
    hidden states."""

    def __init__(
        self,
        opened: OpenedModel,
        folder: Path,
        sequences: TokenSequences,
        parts: PartsFolder,
        asked: _Asked,
        progress: Progress,
    ) -> None:
        self._opened = opened
        self._sequences = sequences
        self._parts = parts
        self._progress = progress
        self.full_hash = FullHash(parts.digests())
        opened.checkpoint.on_read = self.full_hash.add
        self._stream = LayerStream(folder, opened.checkpoint)
        self._watched = watched_sequences(sequences, seed=asked.seed)  # [b, s] int64
        n_tokens, n_watched = sequences.ids.size, self._watched.size
        shape = opened.shape
        n_rows = n_tokens + n_watched * (1 + len(shape.layers))
        self.plan = plan_profile_memory(
            opened,
            n_rows=n_rows,
            n_tokens=n_tokens,
            seq_len=sequences.ids.shape[1],
            asked=asked.memory_bytes,
        )
        hidden_bytes = n_rows * shape.hidden * 4
        require_free_disk(parts.folder, 2 * hidden_bytes)
        progress.note(
            f"hidden states: 2 x {format_bytes(hidden_bytes)} in {parts.folder}"
            + (
                ""
                if self.plan.hidden_in_memory
                else ", worked on there: they exceed a quarter of the budget"
            )
        )
        self._states = HiddenStates(
            parts.folder, n_rows=n_rows, hidden=shape.hidden, in_memory=self.plan.hidden_in_memory
        )
        self._pass = LayerPass(
            opened,
            self._stream,
            PassPlan(
                n_tokens=n_tokens,
                sample_rows=sample_rows(sequences, seed=asked.seed),
                domain_of_sequence=sequences.domain,
                held_out_sequence=sequences.held_out,
                n_domains=len(sequences.domains),
                seq_len=sequences.ids.shape[1],
                probe_bytes=self.plan.probe_bytes,
                seed=asked.seed,
            ),
        )

    @property
    def n_watched(self) -> int:
        """Tokens behind the sensitivities."""
        return self._watched.size

    def record_layers(self, *, resume: bool) -> int:
        """Push everything through every layer; return the decoder layer that the pass began
        with."""
        first = self._states.restore() if resume else None
        shape = self._opened.shape
        if first is None or not all(
            self._parts.layer_file(layer).is_file() for layer in shape.layers if layer < first
        ):
            first = 0
            self._embed()
        elif first > 0:
            self._progress.note(f"resuming at layer {first} of {shape.n_decoder_layers}")
        for layer in self._stream.layers(start=first):
            self._progress.begin(
                f"layer {layer.layer + 1}/{shape.n_decoder_layers}",
                self._sequences.ids.size,
                "tokens",
            )
            self._run_layer(layer)
            self._progress.end()
            self._parts.keep_digests(self.full_hash.digests)
            self._states.commit(layer.layer + 1)
        return first

    @torch.no_grad()
    def sensitivities(self) -> dict[int, float]:
        """Return each MoE layer's sensitivity from the disturbed copies of the watched
        sequences."""
        layers, n_watched = self._opened.shape.layers, self._watched.size
        base = self._sequences.ids.size
        total = dict.fromkeys(layers, 0.0)
        for first in range(0, n_watched, LOGIT_ROWS):
            n_rows = min(LOGIT_ROWS, n_watched - first)
            exact = self._logits(base + first, n_rows)  # [rows, V]
            for position, layer in enumerate(layers):
                row = base + (1 + position) * n_watched + first
                total[layer] += total_divergence(exact, self._logits(row, n_rows))
        self._states.close()
        return {layer: sensitivity(total[layer] / n_watched) for layer in layers}

    def _logits(self, first_row: int, n_rows: int) -> torch.Tensor:
        hidden = self._states.read(first_row, first_row + n_rows)
        return self._stream.logits(hidden[None])[0]

    def _embed(self) -> None:
        row = 0
        for ids in self._batches():
            hidden = self._stream.initial_hidden(ids)
            self._states.write(row, hidden.reshape(ids.numel(), -1))
            row += ids.numel()
        watched = self._stream.initial_hidden(torch.from_numpy(self._watched))
        self._states.write(row, watched.reshape(self._watched.size, -1))
        self._states.commit(0)

    def _run_layer(self, layer: StreamedLayer) -> None:
        self._pass.begin(layer)
        row = 0
        for ids in self._batches():
            hidden = self._states.read(row, row + ids.numel()).view(*ids.shape, -1)
            output = self._pass.forward(hidden, first_row=row)
            self._states.write(row, output.reshape(ids.numel(), -1))
            row += ids.numel()
            self._progress.advance(ids.numel())
        self._run_watched(layer, row)
        if layer.moe is not None:
            trace, statistics = self._pass.measure()
            write_layer_part(self._parts.layer_file(layer.layer), layer.layer, trace, statistics)

    def _run_watched(self, layer: StreamedLayer, base: int) -> None:
        """Carry the untouched and the already disturbed copies through, and disturb one more behind
        a MoE layer."""
        n_watched = self._watched.size
        n_before = sum(before < layer.layer for before in self._opened.shape.layers)
        shape = (*self._watched.shape, -1)
        untouched = self._states.read(base, base + n_watched).view(*shape)
        if layer.moe is not None:
            disturbed = self._pass.forward_disturbed(untouched)
            row = base + (1 + n_before) * n_watched
            self._states.write(row, disturbed.reshape(n_watched, -1))
        for copy in range(1 + n_before):
            row = base + copy * n_watched
            hidden = self._states.read(row, row + n_watched).view(*shape)
            self._states.write(row, self._pass.forward(hidden).reshape(n_watched, -1))

    def _batches(self) -> list[torch.Tensor]:
        ids = torch.from_numpy(self._sequences.ids.astype(np.int64))
        size = self.plan.batch_sequences
        return [ids[first : first + size] for first in range(0, len(ids), size)]


def _traced_tokens(sequences: TokenSequences) -> TracedTokens:
    return TracedTokens(
        ids=sequences.ids,
        domain=sequences.domain,
        document=sequences.document,
        held_out=sequences.held_out,
        domains=sequences.domains,
    )


def _check_arguments(asked: _Asked, out: Path) -> None:
    if asked.tokens < 2 or asked.seq_len < 2:
        raise UsageError(
            f"--tokens {asked.tokens} --seq-len {asked.seq_len}: both must be at least 2"
        )
    if not 0.0 < asked.holdout <= 0.5:
        raise UsageError(
            f"--holdout {asked.holdout} must lie above 0 and at most at 0.5",
            hint="every number that a plan relies on is checked on the held-out part",
        )
    if out.is_dir():
        raise UsageError(f"{out} is a folder", hint="name a file: --out profiles/NAME.h5")
