"""Story of `pack` for a MoLE: its experts become a table with a row per token id, streamed."""

import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_tool import __version__
from moe_tool.artifacts.lookup_manifest import LookupManifest, RowForm
from moe_tool.artifacts.row_tables import HashedBlocks, block_bytes_of
from moe_tool.available_memory import peak_rss_bytes
from moe_tool.errors import CorruptArtifactError, UnsupportedModelError, UsageError
from moe_tool.formats.atomic_write import require_free_disk
from moe_tool.formats.block_hashes import BlockHasher
from moe_tool.formats.bundle_files import MANIFEST, safetensors_header
from moe_tool.formats.json_artifact import write_json_artifact
from moe_tool.formats.lookup_bundle import ROWS_FILE, ROWS_TENSOR, SKELETON_FILE, LookupBundle
from moe_tool.formats.lookup_writer import HashedTensor, bundle_folder, write_file
from moe_tool.formats.safetensors_index import Checkpoint
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
from moe_tool.packing.write_bundle import companion_files
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

    Args:
        located: the checkpoint, whose experts are networks.
        bits: one of ROW_BITS.
        out: folder of the bundle.

    Raises:
        UsageError: `out` is in use.
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
        needed = codes.row_bytes * model.config.vocab_size
        needed += sum(checkpoint.tensors[name].size_bytes for name in kept)
        require_free_disk(out.absolute().parent, needed)
        load_tensors(model, checkpoint)
        with bundle_folder(out) as folder:
            manifest = _write(folder, located, checkpoint, kept, model, codes, progress)
            kl = _prove(folder, model)
        return LookupReport(
            bundle=out,
            bytes=sum(file.size_bytes for file in manifest.files),
            checkpoint_bytes=checkpoint.total_bytes,
            table_bytes=manifest.table_bytes,
            row_bytes=manifest.row_bytes,
            form=manifest.form,
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


def _write(
    folder: Path,
    located: LocatedModel,
    checkpoint: Checkpoint,
    kept: list[str],
    model: MoleForCausalLM,
    codes: RowCodes,
    progress: Progress,
) -> LookupManifest:
    """Write every file of a bundle, the manifest last."""
    config = model.config
    files, skeleton = [], []
    infos = [checkpoint.tensors[name] for name in kept]
    header = safetensors_header([(i.name, i.dtype, i.shape, i.size_bytes) for i in infos])

    def tensors() -> Iterator[bytes]:
        yield header
        for name in kept:
            hashed = HashedTensor(name, [checkpoint.read_bytes(name)])
            yield from hashed
            skeleton.append(hashed.entry())

    files.append(write_file(folder / SKELETON_FILE, tensors()))
    shape = (config.vocab_size, codes.row_bytes)
    block_bytes = block_bytes_of(math.prod(shape))
    hasher = BlockHasher(block_bytes)
    table = hasher.passed(_rows(model, codes, progress))
    header_of_rows = safetensors_header([(ROWS_TENSOR, "U8", shape, math.prod(shape))])
    files.append(write_file(folder / ROWS_FILE, _after(header_of_rows, table)))
    for name, data in companion_files(located.folder, located.tokenizer_folder):
        content = _in_table_form(data) if name == "config.json" else data
        files.append(write_file(folder / name, [content]))
    manifest = LookupManifest(
        tool_version=__version__,
        identity=checkpoint_identity(
            located.folder,
            checkpoint,
            name=located.name,
            model_type=MODEL_TYPE,
            hashed_tensors=[n for n in kept if "router" in n or "norm" in n],
        ),
        vocabulary=config.vocab_size,
        layers=config.num_hidden_layers,
        experts=config.num_experts,
        hidden=config.hidden_size,
        form=codes.form,
        row_bytes=codes.row_bytes,
        skeleton=tuple(skeleton),
        rows=HashedBlocks(block_bytes=block_bytes, xxh3=hasher.result()),
        files=tuple(files),
    )
    write_json_artifact(folder / MANIFEST, manifest)
    return manifest


def _after(header: bytes, pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    yield header
    yield from pieces


def _rows(model: MoleForCausalLM, codes: RowCodes, progress: Progress) -> Iterator[bytes]:
    """Yield the rows of the whole vocabulary, some at a time."""
    vocabulary = model.config.vocab_size
    n_block = max(1, _BLOCK_BYTES // (4 * codes.width))
    progress.begin("write the rows", vocabulary, "rows")
    for begin in range(0, vocabulary, n_block):
        ids = torch.arange(begin, min(begin + n_block, vocabulary))
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


def _prove(folder: Path, model: MoleForCausalLM) -> float:
    """Return the KL of the bundle from its checkpoint in nats per token, on tokens spread over the
    vocabulary; refuse one that is not finite."""
    bundle = LookupBundle.open(folder, is_finished=False)
    packed, table = load_model(bundle)
    try:
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
