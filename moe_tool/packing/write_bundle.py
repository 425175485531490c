"""Execution of a pack job: records of the experts, skeleton, tokenizer, manifest."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.artifacts.bundle_sections import RESIDENT_USE, ROUTING_NORM, ROW_TABLES, Section
from moe_tool.artifacts.expert_ids import ExpertKey
from moe_tool.available_memory import peak_rss_bytes
from moe_tool.errors import MoeToolError
from moe_tool.formats.atomic_write import require_free_disk, storage_errors
from moe_tool.formats.bundle_files import remove_begun
from moe_tool.formats.bundle_writer import BundleWriter
from moe_tool.kept_work import keeping
from moe_tool.models.architecture import OpenedModel
from moe_tool.packing.discard_source import DiscardSource, forget_source
from moe_tool.packing.in_place import InPlace
from moe_tool.packing.plan_pack import PackJob
from moe_tool.packing.prove_bundle import BundleProof, prove_bundle
from moe_tool.packing.skeleton_work import SkeletonWork
from moe_tool.packing.write_records import write_calibrated, write_records
from moe_tool.progress import SILENT, Progress

# Everything a tokenizer, a chat template or `generate` may read, and how weights are quantized;
# nothing else of the checkpoint's folder is copied.
_MODEL_FILES = (
    "config.json",
    "hf_quant_config.json",
    "quantize_config.json",
    "generation_config.json",
)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
COMPANION_FILES = (*_MODEL_FILES, *_TOKENIZER_FILES)
"""Names of the files beside the weights that a bundle copies"""
_COMPANION_MAX_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class PackReport:
    """A finished bundle in numbers."""

    bundle: Path
    bytes: int
    """Size of all files"""
    expert_bytes: int
    """Size of the expert records, alignment included, without replicas"""
    written_expert_bytes: int
    """Size of those of them that do not stay in the checkpoint's files"""
    checkpoint_bytes: int
    """Size of the checkpoint's tensors"""
    replica_bytes: int
    skeleton_bytes: int
    skeleton_bits: str
    """Precision of the skeleton: native, 8 or 4"""
    bits_per_weight: float
    """Bits per expert weight, scales and alignment included"""
    seconds: float
    peak_rss_bytes: int
    output_error: float | None
    """Mean relative error of the stored experts' outputs on held-out tokens; None: not measured"""
    unrouted: tuple[ExpertKey, ...]
    """Experts with too few routed tokens, fitted to other experts' tokens"""
    resumed_records: int
    """Records taken over from an interrupted run"""
    proof: BundleProof | None
    """Predictions compared with the checkpoint's; None: the bundle was finished before"""
    source: Path | None
    """Folder of the checkpoint if the bundle needs it, because experts stay in its files"""
    freed: dict[str, int] | None
    """Size of each downloaded shard that was deleted; None: not asked for"""


def write_bundle(
    job: PackJob,
    opened: OpenedModel,
    progress: Progress = SILENT,
    *,
    in_place: InPlace | None = None,
    discard: DiscardSource | None = None,
) -> PackReport:
    """Compile a checkpoint into a bundle, with one expert in memory, or one layer if codes are
    fitted. An interrupted run is resumed when called again with the same job.

    Args:
        opened: the model of the job; its checkpoint stays open and belongs to the caller.
        in_place: finds the records of `job.spec.placed`, which stay in the checkpoint's files.
        discard: deletes downloaded shards once they are packed; None: they stay.

    Raises:
        UsageError: the bundle's folder holds something else.
        DiskFullError: the bundle would not fit on the disk.
        CorruptArtifactError: the checkpoint is damaged, or the bundle does not compute the same.
        StorageError: a disk refuses.
    """
    start = time.perf_counter()
    skeleton = SkeletonWork(opened, job.skeleton, loader=job.loader, rows=job.rows)
    sources = in_place.sources if in_place else None
    writer = BundleWriter.open(job.out, job.spec, sources=sources)
    resumed = writer.n_written
    unrouted: list[ExpertKey] = []
    with keeping(lambda: writer.n_written > 0):
        if not writer.finished:
            unrouted = _write(job, opened, writer, skeleton, progress, in_place, discard)
        manifest, proof = _finish(job, opened, writer, skeleton, progress, discard)
    forget_source(job.out)
    placed_bytes = sum(manifest.forms[at].size_bytes for at in job.spec.placed)
    n_weights = len(job.spec.order) * job.spec.shape.n_expert_weights
    return PackReport(
        bundle=job.out,
        bytes=sum(file.size_bytes for file in manifest.written_files),
        expert_bytes=manifest.primary_bytes,
        written_expert_bytes=manifest.primary_bytes - placed_bytes,
        checkpoint_bytes=opened.checkpoint.total_bytes,
        replica_bytes=sum(table.size_bytes for table in manifest.cheaper if table.role != "base"),
        skeleton_bytes=skeleton.size_bytes,
        skeleton_bits=job.skeleton.name,
        bits_per_weight=8 * manifest.primary_bytes / n_weights,
        output_error=_error(manifest),
        unrouted=tuple(unrouted),
        seconds=time.perf_counter() - start,
        peak_rss_bytes=peak_rss_bytes(),
        resumed_records=resumed,
        proof=proof,
        source=job.folder if job.spec.placed else None,
        freed=None if discard is None else discard.freed,
    )


def _write(
    job: PackJob,
    opened: OpenedModel,
    writer: BundleWriter,
    skeleton: SkeletonWork,
    progress: Progress,
    in_place: InPlace | None,
    discard: DiscardSource | None,
) -> list[ExpertKey]:
    """Write everything but the manifest; return experts with too few routed tokens."""
    unrouted: list[ExpertKey] = []
    try:
        if discard is not None:
            discard.begin(writer, skeleton, progress)
            discard.free(writer)
            write_records(writer, opened, job.quantizer, progress, after=discard.free)
        elif job.tokens is None:
            _require_disk(job, writer, skeleton)
            write_records(writer, opened, job.quantizer, progress, in_place=in_place)
        else:
            _require_disk(job, writer, skeleton)
            unrouted = write_calibrated(
                writer, opened, job, job.tokens, progress, in_place=in_place
            )
    except MoeToolError:
        if not writer.n_written:  # other options may follow, which a journal would refuse
            with storage_errors(job.out):
                remove_begun(job.out)
        raise
    finally:
        writer.suspend()
    if discard is None:
        skeleton.write(writer, progress)
    else:
        discard.free(writer)
    for name, data in companion_files(job.folder, job.tokenizer):
        writer.add_file(name, data)
    return unrouted


def _finish(
    job: PackJob,
    opened: OpenedModel,
    writer: BundleWriter,
    skeleton: SkeletonWork,
    progress: Progress,
    discard: DiscardSource | None,
) -> tuple[BundleManifest, BundleProof | None]:
    """Prove the bundle and give it its name; no proof if it was finished before."""
    proofs: list[BundleProof] = []

    def prove(folder: Path) -> None:
        progress.begin("prove the bundle", None, "")
        wanted = None if discard is None else discard.reference()
        proofs.append(prove_bundle(job.loader, opened, folder, wanted=wanted, rows=job.rows))
        progress.end()

    manifest = writer.finish(
        heat=job.profile.heat,
        buddies=job.buddies,
        prices=job.profile.prices,
        plan=job.plan,
        sections={} if writer.finished else _sections(job, skeleton),
        profile_sha256=job.profile.sha256,
        prove=prove,
    )
    return manifest, proofs[0] if proofs else None


def _sections(job: PackJob, skeleton: SkeletonWork) -> dict[str, Section]:
    found = {ROW_TABLES: skeleton.section()}
    use, norm = job.profile.resident_use, job.profile.routing_norm
    if use is not None:
        found[RESIDENT_USE] = Section(required=False, body=use.model_dump(mode="json"))
    if norm is not None:
        found[ROUTING_NORM] = Section(required=False, body=norm.model_dump(mode="json"))
    return found


def _require_disk(job: PackJob, writer: BundleWriter, skeleton: SkeletonWork) -> None:
    written = (form for form, _, _ in writer.to_write if form not in job.spec.placed)
    records = sum(writer.forms[form].layout.size_bytes for form in written)
    require_free_disk(job.out.absolute().parent, records + skeleton.size_bytes)


def _error(manifest: BundleManifest) -> float | None:
    found = [record.eps for record in manifest.primary_records if record.eps is not None]
    return float(np.mean(found)) if found else None


def companion_files(model: Path, tokenizer: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the files beside the weights that a bundle copies."""
    paths = [model / name for name in _MODEL_FILES] + [tokenizer / n for n in _TOKENIZER_FILES]
    for path in paths:
        if path.is_file() and path.stat().st_size <= _COMPANION_MAX_BYTES:
            yield path.name, path.read_bytes()
