"""The files of a bundle: their names, how records are spread over them, their headers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_tool.artifacts.form_table import ALIGNMENT_BYTES, Role
from moe_tool.artifacts.precision import AnyPrecision
from moe_tool.formats.record_layout import RecordLayout

MAX_FILE_BYTES = 4 * 2**30
PART_SUFFIX = ".part"
MANIFEST = "manifest.json"
JOURNAL = "journal.jsonl"


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


def plan_expert_files(
    order: Sequence[tuple[int, int]], layout: RecordLayout, *, stem: str
) -> tuple[ExpertFile, ...]:
    """Spread records over files of at most MAX_FILE_BYTES (a larger record gets one to itself)."""
    per_file = max(1, MAX_FILE_BYTES // layout.size_bytes)
    files: list[ExpertFile] = []
    for start in range(0, len(order), per_file):
        records = tuple(order[start : start + per_file])
        files.append(
            ExpertFile(
                name=f"{stem}-{len(files) + 1:05d}.safetensors",
                header=_expert_header(records, layout),
                records=records,
                record_size_bytes=layout.size_bytes,
            )
        )
    return tuple(files)


def file_stem(role: Role, precision: AnyPrecision, *, is_alone: bool) -> str:
    """Return the beginning of a table's file names; `is_alone`: no other table has its role."""
    stem = {"primary": "experts", "base": "experts"}.get(role, f"{role}s")
    has_name = role == "replica" or not is_alone
    return f"{stem}-{precision.name.replace(':', 'x').replace('+', 'o')}" if has_name else stem


def record_places(
    order: Sequence[tuple[int, int, int]], plan: Sequence[Sequence[ExpertFile]]
) -> list[tuple[ExpertFile, int]]:
    """Return the file of every record, and its position there.

    Args:
        order: (form, layer, expert) of the records in the order of writing.
        plan: files by form.
    """
    places, counts = [], [0] * len(plan)
    for form, _, _ in order:
        per_file = len(plan[form][0].records)
        number, position = divmod(counts[form], per_file)
        places.append((plan[form][number], position))
        counts[form] += 1
    return places


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


def _expert_header(records: Sequence[tuple[int, int]], layout: RecordLayout) -> bytes:
    return safetensors_header(
        [
            (
                f"layer.{layer}.expert.{expert}.{segment.name}",
                "U8",
                (segment.size_bytes,),
                segment.size_bytes,
            )
            for layer, expert in records
            for segment in layout.segments
        ]
    )
