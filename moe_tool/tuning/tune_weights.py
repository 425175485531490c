"""The story of `tune weights`: layer by layer, the codes of a bundle are moved until its experts
make up for what it has lost so far; then a new bundle is there."""

import hashlib
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from moe_tool.artifacts.bundle_manifest import TunedWeights
from moe_tool.artifacts.identity import require_same_model
from moe_tool.artifacts.precision import IntegerPrecision
from moe_tool.available_memory import peak_rss_bytes
from moe_tool.errors import CorruptArtifactError, UsageError
from moe_tool.experts.expert_forward import expert_forward
from moe_tool.formats.atomic_write import require_free_disk
from moe_tool.formats.bundle_files import MANIFEST
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.architecture import OpenedModel, open_model
from moe_tool.models.locate import LocatedModel
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.packing.replicas import relative_error
from moe_tool.policies.hot_set import ExpertKey
from moe_tool.progress import SILENT, Progress
from moe_tool.quantization.weights import ExpertWeights, FloatWeight
from moe_tool.text.sequences import TokenSequences, build_sequences
from moe_tool.text.sources import TextSource
from moe_tool.tuning.copied_bundle import CopiedBundle
from moe_tool.tuning.eco import EcoRule, Optimizer, Rounding, state_bytes_per_weight
from moe_tool.tuning.paired_layers import PairedLayer, PairedModel
from moe_tool.tuning.tune_layer import (
    TunedExpert,
    TuneSchedule,
    begin_expert,
    layer_error,
    tune_layer,
    unpack_expert,
)
from moe_tool.tuning.tune_memory import require_tune_memory

RATES: Mapping[Optimizer, float] = {"sgd": 0.1, "adam": 0.01}
"""Learning rates where none is asked for"""
_HOLDOUT = 0.125
_LEAST_ROWS = 32
"""An expert that fewer tokens are sent to has nothing to learn from"""
_MEASURED_TOKENS = 256
_LEAST_MEASURED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """How a bundle is tuned."""

    steps: int = 500
    """Of every layer"""
    batch: int = 1024
    """Tokens of a step"""
    tokens: int = 65536
    """Of text, all domains together, held-out ones included"""
    seq_len: int = 512
    optimizer: Optimizer = "sgd"
    rounding: Rounding = "nearest"
    feedback: Literal["momentum", "none"] = "momentum"
    """Where what rounding loses goes; none: the control"""
    rate: float | None = None
    """Learning rate at the start, in codes, see `TuneSchedule`; None: as RATES says"""
    seed: int = 0
    memory_bytes: int | None = None
    offline: bool = False

    @property
    def first_rate(self) -> float:
        """The learning rate that is meant."""
        return RATES[self.optimizer] if self.rate is None else self.rate


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedLayer:
    """What became of one layer. Errors are of the experts' summed output on held-out tokens,
    relative to what is wanted of it."""

    layer: int
    error_before: float
    error_after: float
    moved: float
    """Share of the codes that are others now"""
    is_kept: bool
    """False: tuning did not lower the error, and the layer is as it was"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneReport:
    """What `tune weights` did."""

    bundle: Path
    bytes: int
    """All files"""
    layers: tuple[TunedLayer, ...]
    """Those that this run tuned, not those of a run that it resumed"""
    untuned: tuple[ExpertKey, ...]
    """Experts of codes, of these layers, that too few tokens are sent to: as they were"""
    state_bytes: int
    """Of the optimizer, in the layer with the most"""
    state_bytes_per_weight: int
    """Of one layer"""
    lineage: tuple[TunedWeights, ...]
    resumed_records: int
    """Records found finished from an interrupted run"""
    drops_calibration: bool
    """The bundle was calibrated, and what that measured no longer holds"""
    seconds: float
    peak_rss_bytes: int
    memory_needed_bytes: int


def tune_weights(
    bundle: Path,
    model: LocatedModel,
    sources: Sequence[TextSource],
    options: TuneOptions,
    *,
    out: Path,
    progress: Progress = SILENT,
) -> TuneReport:
    """Write a bundle whose experts' codes are tuned; the one that it begins with is left alone.

    One layer's experts are in memory at a time, of the exact model or of the bundle. An interrupted
    run is resumed when called again with the same arguments: finished layers are kept.

    Args:
        bundle: to begin with.
        model: the checkpoint that it was packed from.
        sources: the text, by domain.
        options: steps, rates, text.
        out: the new bundle.
        progress: told about every step.

    Raises:
        UsageError: the bundle holds no codes, `out` holds something else, an option means nothing.
        WrongModelError: the bundle was packed from another checkpoint.
        BudgetError: the budget is too small: with what would do.
        CorruptArtifactError, DataSourceError, NotFoundError, StorageError: an input or the disk is
            not as it should be.
    """
    start = time.perf_counter()
    _check(options)
    if out.absolute() == bundle.absolute():
        raise UsageError(f"--out {out} is the bundle to be tuned", hint="choose another --out")
    opened = open_model(model)
    with opened.checkpoint, BundleReader.open(bundle) as reader:
        _require_tunable(bundle, reader, opened)
        sequences = _text(model, opened, sources, options)
        needed = require_tune_memory(
            opened,
            tokens=sequences.ids.size,
            batch=options.batch,
            record_bytes=max(sum(reader.own_record_bytes(x)) for x in opened.shape.layers),
            state_bytes=state_bytes_per_weight(_rule(options)),
            asked=options.memory_bytes,
        )
        step = _lineage(bundle, sequences, options)
        copied = CopiedBundle(reader, out, step)
        resumed = copied.writer.n_written
        work = _Work(opened, copied, options, progress)
        if not copied.writer.finished:
            require_free_disk(out.absolute().parent, copied.missing_bytes)
            try:
                work.run(model.folder, sequences)
            finally:
                copied.writer.suspend()
        manifest = copied.finish(progress)
    return TuneReport(
        bundle=out,
        bytes=sum(file.size_bytes for file in manifest.files),
        layers=tuple(work.layers),
        untuned=tuple(work.untuned),
        state_bytes=work.state_bytes,
        state_bytes_per_weight=state_bytes_per_weight(_rule(options)),
        lineage=manifest.lineage,
        resumed_records=resumed,
        drops_calibration=reader.manifest.calibration is not None,
        seconds=time.perf_counter() - start,
        peak_rss_bytes=peak_rss_bytes(),
        memory_needed_bytes=needed,
    )


class _Work:
    """The layers of one bundle, one after the other."""

    def __init__(
        self, opened: OpenedModel, copied: CopiedBundle, options: TuneOptions, progress: Progress
    ) -> None:
        self._opened = opened
        self._copied = copied
        self._options = options
        self._progress = progress
        self.layers: list[TunedLayer] = []
        self.untuned: list[ExpertKey] = []
        self.state_bytes = 0

    def run(self, folder: Path, sequences: TokenSequences) -> None:
        """Tune and write what is not written yet; what is, answers in its place."""
        missing: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for level, at, expert in self._copied.writer.to_write:
            missing[at].append((level, expert))
        ids = torch.from_numpy(sequences.ids.astype(np.int64))
        paired = PairedModel(folder, self._opened, ids, torch.from_numpy(sequences.held_out))
        for layer in paired.layers(last=max(missing, default=-1)):
            number = layer.layer
            if number in missing:
                paired.go_on_with(self._tune(layer, missing[number]))
            else:
                own = self._copied.own_experts(number)
                paired.go_on_with({e: self._copied.written_expert(number, e) for e in own})

    def _tune(self, layer: PairedLayer, missing: list[tuple[int, int]]) -> dict[int, ExpertWeights]:
        """Tune a layer and write its records; return its experts as they are from now on."""
        number, copied = layer.layer, self._copied
        own = copied.own_experts(number)
        experts = {e: unpack_expert(copied.old_expert(number, e)) for e in own}
        judged = torch.nonzero(layer.held_out).flatten()
        before = layer_error(layer.module, experts, layer.text, judged)
        moving = self._move(layer, experts)
        after = layer_error(layer.module, experts, layer.text, judged)
        is_kept = after < before
        records = {}
        n_moved = n_codes = 0
        for expert in own:
            record = copied.old_record(copied.level(number, expert), number, expert)
            if is_kept and expert in moving:
                old = unpack_expert(copied.decode(number, expert, record)).matrices
                new = experts[expert].matrices
                n_moved += sum(int((new[n].codes != old[n].codes).sum()) for n in old)
                n_codes += sum(matrix.codes.numel() for matrix in old.values())
                record = copied.new_record(number, expert, experts[expert].packed())
            records[expert] = record
            del experts[expert]
        self.layers.append(
            TunedLayer(
                layer=number,
                error_before=before,
                error_after=after if is_kept else before,
                moved=n_moved / max(1, n_codes),
                is_kept=is_kept,
            )
        )
        for level, expert in missing:
            if level in copied.own_levels:
                error = self._error(layer, expert, records[expert])
                copied.writer.write_record(level, number, expert, records[expert], eps=error)
            else:
                copied.copy_replica(level, number, expert)
        return {e: copied.decode(number, e, record) for e, record in records.items()}

    def _move(self, layer: PairedLayer, experts: dict[int, TunedExpert]) -> set[int]:
        """Train the experts that can be, and return which."""
        number, options = layer.layer, self._options
        schedule = TuneSchedule(
            rule=_rule(options),
            steps=options.steps,
            rate=options.first_rate,
            batch=options.batch,
            seed=options.seed + number,
        )
        rows = torch.nonzero(~layer.held_out).flatten()
        wanted = torch.bincount(layer.text.index[rows].flatten(), minlength=max(experts) + 1)
        moving = set()
        for expert, each in experts.items():
            if not each.matrices:
                continue
            if int(wanted[expert]) < _LEAST_ROWS:
                self.untuned.append((number, expert))
                continue
            begin_expert(each, self._opened.experts.read(number, expert), schedule)
            moving.add(expert)
        self.state_bytes = max(self.state_bytes, sum(e.state_bytes for e in experts.values()))
        self._progress.begin(f"tune layer {number}", schedule.steps, "steps")
        if moving:
            on_step = self._progress.advance
            tune_layer(layer.module, experts, layer.text, rows, schedule, on_step=on_step)
        self._progress.end()
        for each in experts.values():
            each.states.clear()
        return moving

    def _error(self, layer: PairedLayer, expert: int, record: torch.Tensor) -> float:
        """Of an expert's output beside the exact one's, on what the exact model gives it."""
        if not self._copied.has_codes(layer.layer, expert):
            return 0.0
        own = torch.nonzero((layer.exact_index == expert).any(dim=1)).flatten()
        rows = own if len(own) >= _LEAST_MEASURED else torch.arange(len(layer.exact_inputs))
        x = layer.exact_inputs[rows[:: max(1, -(-len(rows) // _MEASURED_TOKENS))]]
        exact = {
            name: FloatWeight(values=value)
            for name, value in self._opened.experts.read(layer.layer, expert).items()
        }
        with torch.no_grad():
            found = expert_forward(
                layer.module, self._copied.decode(layer.layer, expert, record), x
            )
            return relative_error(expert_forward(layer.module, exact, x), found)


def _rule(options: TuneOptions) -> EcoRule:
    return EcoRule(
        optimizer=options.optimizer, rounding=options.rounding, feedback=options.feedback
    )


def _check(options: TuneOptions) -> None:
    for name, value in (("steps", options.steps), ("batch", options.batch)):
        if value < 1:
            raise UsageError(f"--{name} {value}: at least 1 is needed")
    if not 0 < options.first_rate <= 1e6:
        raise UsageError(f"--rate {options.first_rate:g}: not possible", hint="in codes, e.g. 0.1")


def _require_tunable(bundle: Path, reader: BundleReader, opened: OpenedModel) -> None:
    manifest = reader.manifest
    require_same_model(
        manifest.identity,
        opened.identity,
        artifact=f"the bundle {bundle}",
        remedy="give --model the checkpoint that the bundle was packed from",
    )
    if manifest.shape != opened.shape:
        raise CorruptArtifactError(
            f"{bundle / MANIFEST} describes another shape than that of {opened.identity.name}",
            hint="pack the bundle again with moe-tool pack",
        )
    precisions = [reader.levels[level].form.precision for level in reader.own_levels]
    if manifest.choosers is not None:
        raise UsageError(
            f"the experts of {bundle} are in channels, whose codes are not tuned",
            hint="pack it with --bits 4 and without --sparse-experts",
        )
    if any(table.is_base for table in manifest.replicas):
        raise UsageError(
            f"the experts of {bundle} are nested: with their codes the first bits would change, "
            "which nothing is asked of",
            hint="pack it with --bits 4, and --replicas 2 beside it",
        )
    if not any(isinstance(each, IntegerPrecision) for each in precisions):
        raise UsageError(
            f"the experts of {bundle} are floats, there are no codes to tune",
            hint="pack it with --bits 4 or fewer first",
        )


def _text(
    model: LocatedModel, opened: OpenedModel, sources: Sequence[TextSource], options: TuneOptions
) -> TokenSequences:
    sequences = build_sequences(
        sources,
        load_tokenizer(model.folder),
        vocabulary=opened.shape.vocabulary,
        n_tokens=options.tokens,
        seq_len=min(options.seq_len, opened.max_positions),
        holdout=_HOLDOUT,
        seed=options.seed,
        offline=options.offline,
    )
    if not sequences.held_out.any():
        raise UsageError(
            f"--tokens {options.tokens}: one sequence cannot be both learned from and judged by",
            hint="more --tokens, or a smaller --seq-len",
        )
    return sequences


def _lineage(bundle: Path, sequences: TokenSequences, options: TuneOptions) -> TunedWeights:
    digest = hashlib.sha256(np.ascontiguousarray(sequences.ids).tobytes())
    digest.update(np.ascontiguousarray(sequences.held_out).tobytes())
    return TunedWeights(
        parent_sha256=hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest(),
        sources=sequences.sources,
        tokens=int(sequences.ids.size),
        tokens_sha256=digest.hexdigest(),
        steps=options.steps,
        batch_tokens=options.batch,
        optimizer=options.optimizer,
        rounding=options.rounding,
        feedback=options.feedback,
        rate=options.first_rate,
        seed=options.seed,
    )
