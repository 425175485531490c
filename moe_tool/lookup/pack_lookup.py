"""Story of `pack` for a MoLE: its experts become a table with a row per token id, streamed."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_tool import __version__
from moe_tool.artifacts.bundle_manifest import SkeletonTensor
from moe_tool.artifacts.identity import ModelIdentity
from moe_tool.artifacts.lookup_manifest import LookupManifest, RowForm
from moe_tool.available_memory import peak_rss_bytes
from moe_tool.errors import (
    CorruptArtifactError,
    MoeToolError,
    StorageError,
    UnsupportedModelError,
    UsageError,
)
from moe_tool.formats.atomic_write import require_free_disk
from moe_tool.formats.bundle_files import safetensors_header
from moe_tool.formats.lookup_bundle import SKELETON_FILE, LookupBundle
from moe_tool.formats.lookup_writer import HashedTensor, LookupSpec, LookupWriter
from moe_tool.formats.safetensors_index import Checkpoint
from moe_tool.kept_work import keeping
from moe_tool.lookup.disk_rows import load_model
from moe_tool.models.checkpoint_identity import checkpoint_identity
from moe_tool.models.generation_settings import read_generation_settings
from moe_tool.models.locate import LocatedModel
from moe_tool.models.mole.config import MODEL_TYPE
from moe_tool.models.mole.expert_rows import expert_rows
from moe_tool.models.mole.load_mole import build_mole, check_tensors, load_tensors
from moe_tool.models.mole.modeling import MoleForCausalLM
from moe_tool.models.tokenizer import load_tokenizer
from moe_tool.packing.source_notes import tokenizer_notes
from moe_tool.packing.write_bundle import COMPANION_FILES, companion_files
from moe_tool.progress import SILENT, Progress
from moe_tool.quantization.row_codes import RowCodes

ROW_BITS = ("native", "8", "nf4")
_BLOCK_BYTES = 4 * 2**20
"""Size of the float32 rows that are computed at once"""
_PROOF_TOKENS = 8
_EXPERT_PARTS = (".experts.", ".expert_layernorm.")


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupReport:
    """A finished lookup bundle in numbers."""

    bundle: Path
    bytes: int
    """Size of all files"""
    checkpoint_bytes: int
    table_bytes: int
    """Size of the table of rows"""
    row_bytes: int
    """Size of a row: what a new token reads"""
    form: RowForm
    resumed_rows: int
    """Rows taken over from an interrupted run"""
    proof_tokens: int
    """Tokens sent through checkpoint and bundle"""
    proof_kl: float
    """Nats per token between the two on these tokens"""
    seconds: float
    peak_rss_bytes: int


def parse_row_bits(text: str | None) -> str:
    """Return the form of rows that `--bits` names; native without it.

    Raises:
        UsageError: rows have no such form.
    """
    bits = (text or "native").strip().lower()
    if bits not in ROW_BITS:
        raise UsageError(
            f"--bits {text}: rows of a lookup table are native, 8 or nf4", hint="--bits nf4"
        )
    return bits


def pack_lookup(
    located: LocatedModel, *, bits: str, out: Path, progress: Progress = SILENT
) -> LookupReport:
    """Compile a MoLE into a lookup bundle; the table is never in memory, the model is, in float32.

    An interrupted run is resumed when called again with the same arguments.

    Args:
        located: the checkpoint, whose experts are networks.
        bits: one of ROW_BITS.
        out: folder of the bundle.

    Raises:
        UsageError, WrongModelError: `out` is in use, or was begun with something else.
        UnsupportedModelError: the experts are a table already.
        CorruptArtifactError, NotFoundError: the checkpoint is damaged or incomplete.
        DiskFullError, StorageError: the disk refuses.
    """
    begun = time.perf_counter()
    model = build_mole(located.folder)
    if model.config.experts_form != "ffn":
        raise UnsupportedModelError(
            f"the experts of {located.name} are a table already",
            hint="pack the checkpoint that it was made from",
        )
    words = load_tokenizer(located.tokenizer_folder)
    read_generation_settings(located.folder)
    for warning in tokenizer_notes(words, model.config.vocab_size):
        progress.note(warning)
    with Checkpoint.open_folder(located.folder) as checkpoint:
        check_tensors(model, checkpoint, located.folder)
        codes = RowCodes(form=_form(bits, checkpoint), width=model.config.row_width)
        kept = [n for n in checkpoint.tensors if not any(part in n for part in _EXPERT_PARTS)]
        spec = LookupSpec(
            identity=lookup_identity(located, checkpoint),
            form=codes.form,
            n_rows=model.config.vocab_size,
            row_bytes=codes.row_bytes,
            rows_at_once=max(1, _BLOCK_BYTES // (4 * codes.width)),
        )
        writer = LookupWriter.open(out, spec, beside=(SKELETON_FILE, *COMPANION_FILES))
        resumed = writer.n_rows
        with keeping(lambda: writer.n_rows > 0):
            manifest, kl = _pack(writer, spec, located, checkpoint, kept, model, codes, progress)
        return LookupReport(
            bundle=out,
            bytes=sum(file.size_bytes for file in manifest.files),
            checkpoint_bytes=checkpoint.total_bytes,
            table_bytes=manifest.table_bytes,
            row_bytes=manifest.row_bytes,
            form=manifest.form,
            resumed_rows=resumed,
            proof_tokens=_PROOF_TOKENS,
            proof_kl=kl,
            seconds=time.perf_counter() - begun,
            peak_rss_bytes=peak_rss_bytes(),
        )


def _form(bits: str, checkpoint: Checkpoint) -> RowForm:
    """Return the form of rows; native is the experts' dtype, float32 where they differ."""
    if bits != "native":
        return "int8" if bits == "8" else "nf4"
    experts = {i.dtype for name, i in checkpoint.tensors.items() if ".experts." in name}
    forms: dict[str, RowForm] = {"F16": "F16", "BF16": "BF16"}
    return forms.get(experts.pop(), "F32") if len(experts) == 1 else "F32"


def lookup_identity(located: LocatedModel, checkpoint: Checkpoint) -> ModelIdentity:
    """Return the identity of a MoLE's checkpoint; reads routers and the norms outside experts.

    Raises:
        CorruptArtifactError, StorageError: a tensor cannot be read.
    """
    kept = [n for n in checkpoint.tensors if not any(part in n for part in _EXPERT_PARTS)]
    return checkpoint_identity(
        located.folder,
        checkpoint,
        name=located.name,
        model_type=MODEL_TYPE,
        hashed_tensors=[n for n in kept if "router" in n or "norm" in n],
    )


def _pack(
    writer: LookupWriter,
    spec: LookupSpec,
    located: LocatedModel,
    checkpoint: Checkpoint,
    kept: list[str],
    model: MoleForCausalLM,
    codes: RowCodes,
    progress: Progress,
) -> tuple[LookupManifest, float]:
    """Write what is missing of a bundle, prove it and give it its name; return its manifest and the
    divergence from its checkpoint.

    Rows stay for a resume where the disk or somebody interrupts, not where the checkpoint, or its
    values in these bits, are refused.
    """
    try:
        if writer.n_rows:
            progress.note(f"resuming after {writer.n_rows} of {spec.n_rows} rows")
        needed = (spec.n_rows - writer.n_rows) * spec.row_bytes
        needed += sum(checkpoint.tensors[name].size_bytes for name in kept)
        require_free_disk(writer.folder.absolute().parent, needed)
        load_tensors(model, checkpoint)
        if writer.is_complete:
            manifest = writer.read_manifest()
        else:
            manifest = _write(writer, spec, located, checkpoint, kept, model, codes, progress)
        is_old = writer.is_complete
        return manifest, writer.finish(manifest, lambda at: _prove(at, model, checks_rows=is_old))
    except BaseException as error:
        is_refused = isinstance(error, MoeToolError) and not isinstance(error, StorageError)
        if is_refused or not writer.n_rows:
            writer.discard()
        raise
    finally:
        writer.suspend()


def _write(
    writer: LookupWriter,
    spec: LookupSpec,
    located: LocatedModel,
    checkpoint: Checkpoint,
    kept: list[str],
    model: MoleForCausalLM,
    codes: RowCodes,
    progress: Progress,
) -> LookupManifest:
    """Write every file of a bundle but the manifest, which is returned."""
    for rows in _rows(model, codes, writer.n_rows, spec.rows_at_once, progress):
        writer.append(rows)
    blocks = writer.end_rows()
    skeleton: list[SkeletonTensor] = []
    infos = [checkpoint.tensors[name] for name in kept]
    header = safetensors_header([(i.name, i.dtype, i.shape, i.size_bytes) for i in infos])

    def tensors() -> Iterator[bytes]:
        yield header
        for name in kept:
            hashed = HashedTensor(name, [checkpoint.read_bytes(name)])
            yield from hashed
            skeleton.append(hashed.entry())

    writer.add_file(SKELETON_FILE, tensors())
    for name, data in companion_files(located.folder, located.tokenizer_folder):
        writer.add_file(name, [_in_table_form(data) if name == "config.json" else data])
    config = model.config
    return LookupManifest(
        tool_version=__version__,
        identity=spec.identity,
        vocabulary=config.vocab_size,
        layers=config.num_hidden_layers,
        experts=config.num_experts,
        hidden=config.hidden_size,
        form=codes.form,
        row_bytes=codes.row_bytes,
        skeleton=tuple(skeleton),
        rows=blocks,
        files=tuple(writer.files),
    )


def _rows(
    model: MoleForCausalLM, codes: RowCodes, first: int, at_once: int, progress: Progress
) -> Iterator[bytes]:
    """Yield the rows of the vocabulary from `first` on, some at a time."""
    vocabulary = model.config.vocab_size
    progress.begin("write the rows", vocabulary - first, "rows")
    for begin in range(first, vocabulary, at_once):
        ids = torch.arange(begin, min(begin + at_once, vocabulary))
        rows = expert_rows(model, ids)
        if not torch.isfinite(rows).all():
            raise CorruptArtifactError(
                f"experts give NaN or infinity for a token of {begin} to {int(ids[-1])}",
                hint="download the checkpoint again",
            )
        try:
            yield codes.encode(rows).numpy().tobytes()
        except ValueError as error:
            raise UnsupportedModelError(
                f"rows of tokens {begin} to {int(ids[-1])}: {error}",
                hint="--bits 8, or a checkpoint saved in float32",
            ) from error
        progress.advance(len(ids))
    progress.end()


def _in_table_form(config: bytes) -> bytes:
    fields: dict[str, Any] = json.loads(config)
    return json.dumps(fields | {"experts_form": "table"}, indent=2).encode()


def _prove(folder: Path, model: MoleForCausalLM, *, checks_rows: bool) -> float:
    """Return the KL of the bundle from its checkpoint in nats per token, on tokens spread over the
    vocabulary; refuse one that is not finite.

    Args:
        checks_rows: whether every row is compared with its hash, of a table that an earlier process
            left.
    """
    bundle = LookupBundle.open(folder, is_finished=False)
    packed, table = load_model(bundle)
    try:
        if checks_rows:
            table.rows.verify()
        ids = torch.linspace(0, model.config.vocab_size - 1, _PROOF_TOKENS).long()[None]
        with torch.inference_mode():
            wanted, found = (m(input_ids=ids).logits.log_softmax(-1) for m in (model, packed))
        kl = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    finally:
        table.rows.close()
    if not math.isfinite(kl):
        raise CorruptArtifactError(
            "checkpoint or bundle give logits that are not finite",
            hint="download the checkpoint again",
        )
    return max(0.0, kl)
