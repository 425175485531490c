"""The files of a bundle: their names and headers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_tool.artifacts.form_table import ALIGNMENT_BYTES
from moe_tool.errors import UsageError
from moe_tool.formats.bundle_names import JOURNAL as JOURNAL
from moe_tool.formats.bundle_names import MANIFEST as MANIFEST
from moe_tool.formats.bundle_names import PART_SUFFIX as PART_SUFFIX
from moe_tool.formats.record_layout import RecordLayout

MAX_FILE_BYTES = 4 * 2**30
_DTYPES = {torch.uint8: "U8", torch.float64: "F64", torch.float32: "F32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFile:
    """One file of records."""

    name: str
    header: bytes
    """Length prefix, JSON and padding to a multiple of ALIGNMENT_BYTES; the data follow"""
    records: tuple[tuple[int, int], ...]
    """Records as (layer, expert) in file order"""
    record_size_bytes: int

    def offset(self, position: int) -> int:
        """Return the offset of the record at a position."""
        return len(self.header) + position * self.record_size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SkeletonEntry:
    """One tensor to be written to the skeleton files."""

    name: str
    dtype: str
    """safetensors' name: F32, BF16, F16, U8, ..."""
    shape: tuple[int, ...]
    size_bytes: int


def partial_folder(out: Path) -> Path:
    """Return the folder in which a bundle is written until it is finished."""
    return out.parent / (out.name + PART_SUFFIX)


def require_bundle_name(out: Path) -> None:
    """Refuse the name of a half-written bundle for a whole one."""
    if out.name.endswith(PART_SUFFIX):
        raise UsageError(
            f"{out}: names ending in {PART_SUFFIX} are for half-written bundles",
            hint="choose another --out",
        )


def is_taken(out: Path) -> bool:
    """Return whether a name is in use by more than an empty folder, which a rename replaces."""
    if out.is_symlink() or not out.is_dir() or out.is_mount():
        return out.is_symlink() or out.exists()
    return any(out.iterdir())


def remove_begun(out: Path) -> None:
    """Remove the folder of a bundle that was begun, if it holds nothing but the journal."""
    folder = partial_folder(out)
    if [path.name for path in folder.iterdir()] == [JOURNAL]:
        (folder / JOURNAL).unlink()
        folder.rmdir()


def split_skeleton(
    tensors: Sequence[SkeletonEntry], *, limit_bytes: int
) -> list[list[SkeletonEntry]]:
    """Return the tensors of each skeleton file: `limit_bytes` at most, or one larger tensor."""
    groups: list[list[SkeletonEntry]] = [[]]
    size = 0
    for info in tensors:
        if groups[-1] and size + info.size_bytes > limit_bytes:
            groups.append([])
            size = 0
        groups[-1].append(info)
        size += info.size_bytes
    return groups


def safetensors_header(tensors: Sequence[tuple[str, str, Sequence[int], int]]) -> bytes:
    """Return the header of a safetensors file, padded with spaces to ALIGNMENT_BYTES.

    Args:
        tensors: name, dtype, shape and size in bytes of each, in file order.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, size in tensors:
        entries[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def record_file_header(records: Sequence[tuple[int, int]], layout: RecordLayout) -> bytes:
    """Return the header of a file of records, (layer, expert) in file order."""
    return safetensors_header(
        [
            (f"layer.{layer}.expert.{expert}.{s.name}", "U8", (s.size_bytes,), s.size_bytes)
            for layer, expert in records
            for s in layout.segments
        ]
    )


def safetensors_file(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return a whole file of uint8, float32 and float64 tensors."""
    header = safetensors_header(
        [(name, _DTYPES[each.dtype], each.shape, each.nbytes) for name, each in tensors.items()]
    )
    return header + b"".join(each.contiguous().numpy().tobytes() for each in tensors.values())
