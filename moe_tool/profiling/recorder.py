"""The story of `profile`: one decoder layer in memory, every batch through it, its experts
measured, its part written, the next."""

import hashlib
import json
import shutil
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
from moe_tool.formats.atomic_write import atomic_write_bytes, require_free_disk
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
from moe_tool.profiling.routing_report import report_routing
from moe_tool.profiling.sensitivity import sensitivity
from moe_tool.progress import SILENT, Progress
from moe_tool.text.sequences import TokenSequences, build_sequences
from moe_tool.text.sources import TextSource

PROBE_TOKENS = 1024
"""Tokens per layer on which all experts are evaluated, in-sample and held-out together."""
SENSITIVITY_SEQUENCES = 2
SENSITIVITY_TOKENS = 128
"""Per sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileReport:
    """What `profile` measured."""

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
    start = time.perf_counter()
    _check_arguments(tokens=tokens, seq_len=seq_len, holdout=holdout)
    if out.is_dir():
        raise UsageError(f"{out} is a folder", hint="name a file: --out profiles/NAME.h5")
    opened = open_model(model)
    with opened.checkpoint:
        if not may_replace:
            require_unclaimed(out, opened.identity)
        tokenizer = load_tokenizer(model.folder)
        sequences = build_sequences(
            sources,
            tokenizer,
            vocabulary=opened.shape.vocabulary,
            n_tokens=tokens,
            seq_len=min(seq_len, opened.max_positions),
            holdout=holdout,
            seed=seed,
            offline=offline,
        )
        header = ProfileHeader(
            identity=opened.identity,
            shape=opened.shape,
            tokenizer_sha256=tokenizer_sha256(model.folder),
            sources=sequences.sources,
            seed=seed,
            seq_len=sequences.ids.shape[1],
            holdout=holdout,
            tool_version=__version__,
            skeleton=skeleton_facts(opened, model.folder),
        )
        parts = _PartsFolder(out)
        parts.open(header, sequences, resume=resume)
        run = _Run(opened, model.folder, sequences, parts, memory_bytes, seed, progress)
        first_layer = run.record_layers(resume=resume)
        sensitivities = run.sensitivities()
        identity = opened.identity.model_copy(update={"full": run.full_hash.result()})
        write_profile(
            out,
            header.model_copy(update={"identity": identity}),
            _traced_tokens(sequences),
            parts.layer_files(opened.shape.layers),
            sensitivities,
            sensitivity_n_tokens=run.n_watched,
        )
        coverage = tuple(
            layer_coverage(layer, read_layer_part(parts.layer_file(layer), layer)[1])
            for layer in opened.shape.layers
        )
        parts.remove()
    with ProfileReader.open(out) as profile:
        routing = report_routing(profile, progress)
    seconds = time.perf_counter() - start
    return ProfileReport(
        profile=out,
        tokens=sequences.ids.size,
        layers=len(opened.shape.layers),
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


class _Run:
    """One pass over the layers: batches, the sensitivity's sequences behind them, the store of
    hidden states."""

    def __init__(
        self,
        opened: OpenedModel,
        folder: Path,
        sequences: TokenSequences,
        parts: "_PartsFolder",
        memory_bytes: int | None,
        seed: int,
        progress: Progress,
    ) -> None:
        self._opened = opened
        self._sequences = sequences
        self._parts = parts
        self._progress = progress
        self.full_hash = FullHash(parts.digests())
        opened.checkpoint.on_read = self.full_hash.add
        self._stream = LayerStream(folder, opened.checkpoint)
        self._watched = _watched_sequences(sequences, seed=seed)  # [b, s] int64
        n_tokens, n_watched = sequences.ids.size, self._watched.size
        shape = opened.shape
        n_rows = n_tokens + n_watched * (1 + len(shape.layers))
        self.plan = plan_profile_memory(
            opened,
            n_rows=n_rows,
            n_tokens=n_tokens,
            seq_len=sequences.ids.shape[1],
            asked=memory_bytes,
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
                sample_rows=_sample_rows(sequences, seed=seed),
                domain_of_sequence=sequences.domain,
                held_out_sequence=sequences.held_out,
                n_domains=len(sequences.domains),
                seq_len=sequences.ids.shape[1],
                probe_bytes=self.plan.probe_bytes,
                seed=seed,
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


class _PartsFolder:
    """`<out>.parts/`: what is finished of a profile, and the arguments that it belongs to."""

    def __init__(self, out: Path) -> None:
        self.folder = out.with_name(f"{out.name}.parts")

    def open(self, header: ProfileHeader, sequences: TokenSequences, *, resume: bool) -> None:
        """Create the folder, or check that what is in it was begun with the same arguments."""
        wanted = _fingerprint(header, sequences)
        journal = self.folder / "arguments.json"
        if resume and journal.is_file():
            if journal.read_bytes() != wanted:
                raise UsageError(
                    f"{self.folder} was begun with another model, text, seed or version",
                    hint="repeat the interrupted command with --resume, or choose another --out",
                )
            return
        self._remove_old(header.identity.quick)
        self.folder.mkdir(parents=True)
        atomic_write_bytes(journal, wanted)

    def _remove_old(self, model: str) -> None:
        """Make room for a new profile; what is not an interrupted one is not ours to delete."""
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise UsageError(
                f"{self.folder} is in the way: it is not a folder", hint="choose another --out"
            )
        if not self.folder.exists():
            return
        if any(self.folder.iterdir()) and not (self.folder / "arguments.json").is_file():
            raise UsageError(
                f"{self.folder} is in the way: it holds something else than an interrupted profile",
                hint="choose another --out, or remove it",
            )
        if self._model() not in (None, model):
            raise UsageError(
                f"{self.folder} is in the way: it holds an interrupted profile of another model",
                hint="choose another --out, or remove it",
            )
        shutil.rmtree(self.folder)

    def _model(self) -> str | None:
        """Of which model the parts are; None where the journal does not say."""
        try:
            kept = json.loads((self.folder / "arguments.json").read_bytes())
            return str(kept["model"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def layer_file(self, layer: int) -> Path:
        """Where a layer's part lies."""
        return self.folder / f"layer-{layer:05d}.h5"

    def layer_files(self, layers: Sequence[int]) -> dict[int, Path]:
        """All of them."""
        return {layer: self.layer_file(layer) for layer in layers}

    def keep_digests(self, digests: dict[str, str]) -> None:
        """Keep what the full hash knows of the tensors read so far: a resume does not read them
        again."""
        atomic_write_bytes(self.folder / "digests.json", json.dumps(digests).encode())

    def digests(self) -> dict[str, str]:
        """Return what was kept; nothing at the beginning."""
        try:
            kept = json.loads((self.folder / "digests.json").read_text())
        except (OSError, ValueError):
            return {}
        return kept if isinstance(kept, dict) else {}

    def remove(self) -> None:
        """Delete the folder once the profile is written."""
        shutil.rmtree(self.folder)


def _fingerprint(header: ProfileHeader, sequences: TokenSequences) -> bytes:
    ids = hashlib.sha256(np.ascontiguousarray(sequences.ids).tobytes()).hexdigest()
    held_out = hashlib.sha256(sequences.held_out.tobytes()).hexdigest()
    fields = {
        "model": header.identity.quick,
        "tokens": ids,
        "held_out": held_out,
        "sources": list(header.sources),
        "seed": header.seed,
        "tool_version": header.tool_version,
    }
    return json.dumps(fields, indent=1, sort_keys=True).encode()


def _traced_tokens(sequences: TokenSequences) -> TracedTokens:
    return TracedTokens(
        ids=sequences.ids,
        domain=sequences.domain,
        document=sequences.document,
        held_out=sequences.held_out,
        domains=sequences.domains,
    )


def _sample_rows(sequences: TokenSequences, *, seed: int) -> np.ndarray:
    """Rows (tokens) of the probe, ascending: three quarters in-sample, one quarter held-out where
    there is one."""
    generator = np.random.default_rng([seed, 1])
    held_out = np.repeat(sequences.held_out, sequences.ids.shape[1])
    n_held_out = min(PROBE_TOKENS // 4, int(held_out.sum()))
    chosen = [
        generator.choice(np.flatnonzero(part), min(count, int(part.sum())), replace=False)
        for part, count in ((~held_out, PROBE_TOKENS - n_held_out), (held_out, n_held_out))
    ]
    return np.sort(np.concatenate(chosen))


def _watched_sequences(sequences: TokenSequences, *, seed: int) -> np.ndarray:
    """[b, s] int64: the beginnings of a few in-sample sequences, on which sensitivity is
    measured."""
    generator = np.random.default_rng([seed, 2])
    candidates = np.flatnonzero(~sequences.held_out)
    count = min(SENSITIVITY_SEQUENCES, len(candidates))
    chosen = np.sort(generator.choice(candidates, count, replace=False))
    return sequences.ids[chosen, :SENSITIVITY_TOKENS].astype(np.int64)


def _check_arguments(*, tokens: int, seq_len: int, holdout: float) -> None:
    if tokens < 2 or seq_len < 2:
        raise UsageError(f"--tokens {tokens} --seq-len {seq_len}: both must be at least 2")
    if not 0.0 < holdout <= 0.5:
        raise UsageError(
            f"--holdout {holdout} must lie above 0 and at most at 0.5",
            hint="every number that a plan relies on is checked on the held-out part",
        )
