"""Story of `tune weights`: train the codes layer by layer, so that each layer's experts compensate
earlier errors, and write a new bundle."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_tool.artifacts.bundle_manifest import TunedWeights
from moe_tool.artifacts.bundle_sections import TunedFloats
from moe_tool.artifacts.expert_ids import ExpertKey
from moe_tool.artifacts.identity import require_same_model
from moe_tool.available_memory import peak_rss_bytes
from moe_tool.errors import CorruptArtifactError, UsageError
from moe_tool.formats.atomic_write import require_free_disk
from moe_tool.formats.bundle_files import MANIFEST
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.kept_work import keeping
from moe_tool.models.architecture import OpenedModel, open_model
from moe_tool.models.locate import LocatedModel
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.progress import SILENT, Progress
from moe_tool.text.sequences import TokenSequences, build_sequences
from moe_tool.text.sources import TextSource
from moe_tool.tuning.copied_bundle import CopiedBundle
from moe_tool.tuning.eco import state_bytes_per_weight
from moe_tool.tuning.float_weights import FloatWeights
from moe_tool.tuning.tune_bundle import BundleTuner, TunedLayer
from moe_tool.tuning.tune_floats import find_trainable, require_held_out, tune_floats
from moe_tool.tuning.tune_memory import require_tune_memory
from moe_tool.tuning.tune_options import TuneOptions

_HOLDOUT = 0.125


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneReport:
    """A tuned bundle in numbers."""

    bundle: Path
    bytes: int
    """Size of all files"""
    layers: tuple[TunedLayer, ...]
    """Layers tuned by this run, without those of an interrupted one"""
    untuned: tuple[ExpertKey, ...]
    """Quantized experts of these layers with too few routed tokens, left unchanged"""
    state_bytes: int
    """Optimizer state of the layer with the most"""
    state_bytes_per_weight: int
    """Optimizer state per weight of a layer"""
    lineage: tuple[TunedWeights, ...]
    floats: TunedFloats | None
    """Trained norms and routers, with the share of each that was kept; None: not trained"""
    resumed_records: int
    """Records taken over from an interrupted run"""
    drops_calibration: bool
    """Whether a calibration was dropped, since the codes changed"""
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
    """Write a new bundle with tuned codes; the old one is unchanged.

    One layer's experts are in memory at a time, of the exact model or of the bundle. An interrupted
    run is resumed when called again with the same arguments: finished layers are kept.

    Raises:
        UsageError, WrongModelError: bundle, `out`, option or checkpoint do not fit.
        BudgetError: the budget is too small; the hint names one that is not.
        CorruptArtifactError, DataSourceError, NotFoundError, StorageError: input or disk fails.
    """
    start = time.perf_counter()
    options.require_possible()
    if out.absolute() == bundle.absolute():
        raise UsageError(f"--out {out} is the bundle to be tuned", hint="choose another --out")
    opened = open_model(model)
    with opened.checkpoint, BundleReader.open(bundle) as reader:
        _require_tunable(bundle, reader, opened)
        sequences = _text(model, opened, sources, options, progress)
        floats = _floats(model, opened, reader, sequences, options)
        needed = require_tune_memory(opened, reader, options, sequences, floats)
        step = _lineage(bundle, sequences, options)
        copied = CopiedBundle(reader, out, step, beside=_beside(options))
        resumed = copied.writer.n_written
        work = BundleTuner(opened, copied, options, progress)
        if not copied.writer.finished:
            require_free_disk(out.absolute().parent, copied.missing_bytes)
            try:
                with keeping(lambda: copied.writer.n_written > 0):
                    work.run(model.folder, sequences)
                if floats is not None:
                    tune_floats(model.folder, opened, copied, floats, sequences, options, progress)
            finally:
                copied.writer.suspend()
        manifest = copied.finish(progress)
    return TuneReport(
        bundle=out,
        bytes=sum(file.size_bytes for file in manifest.files),
        layers=tuple(work.layers),
        untuned=tuple(work.untuned),
        state_bytes=work.state_bytes,
        state_bytes_per_weight=state_bytes_per_weight(options.rule),
        lineage=manifest.lineage,
        floats=manifest.tuned_floats,
        resumed_records=resumed,
        drops_calibration=reader.manifest.calibration is not None,
        seconds=time.perf_counter() - start,
        peak_rss_bytes=peak_rss_bytes(),
        memory_needed_bytes=needed,
    )


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
            f"{bundle / MANIFEST} has another shape than {opened.identity.name}",
            hint="pack the bundle again with moe-tool pack",
        )
    if manifest.selectors:
        raise UsageError(
            f"the experts of {bundle} are in channels, whose codes are not tuned",
            hint="pack it with --bits 4 and without --sparse-experts",
        )
    if any(table.role == "base" for table in manifest.cheaper):
        raise UsageError(
            f"the experts of {bundle} are nested: tuning their codes would change the base, which "
            "is not trained",
            hint="pack it with --bits 4, and --replicas 2 beside it",
        )
    if manifest.tuned_floats is not None and manifest.tuned_floats.is_kept:
        raise UsageError(
            f"norms or routers of {bundle} were tuned: the next tuning would begin with those of "
            "the checkpoint",
            hint="tune the bundle that it was made from, with more --steps",
        )
    if not any(table.precision.is_coded for table in manifest.primaries):
        raise UsageError(
            f"the experts of {bundle} are floats, there are no codes to tune",
            hint="pack it with --bits 4 or fewer first",
        )


def _text(
    model: LocatedModel,
    opened: OpenedModel,
    sources: Sequence[TextSource],
    options: TuneOptions,
    progress: Progress,
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
        progress=progress,
    )
    if not sequences.held_out.any():
        raise UsageError(
            f"--tokens {options.tokens}: at least two sequences are needed, to train and to judge",
            hint="more --tokens, or a smaller --seq-len",
        )
    return sequences


def _floats(
    model: LocatedModel,
    opened: OpenedModel,
    reader: BundleReader,
    sequences: TokenSequences,
    options: TuneOptions,
) -> FloatWeights | None:
    """Return the norms and routers to train; None: none."""
    if not options.tunes_floats:
        return None
    require_held_out(sequences, options)
    return find_trainable(model.folder, opened, reader, options)


def _beside(options: TuneOptions) -> Mapping[str, object]:
    """Return the options of norms and routers; none where they are not trained."""
    if not options.tunes_floats:
        return {}
    return {
        "norms": options.norms,
        "router": options.router,
        "float_rate": options.first_float_rate,
    }


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
