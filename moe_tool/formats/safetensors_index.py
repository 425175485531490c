"""safetensors files read as hostile input: the whole header is checked before any tensor is read.

Bytes are read with pread into fresh tensors, not mapped, because mapped pages count as resident
memory and would break the memory budget.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from moe_tool.errors import (
    CorruptArtifactError,
    NotFoundError,
    StorageError,
    UnsupportedModelError,
)
from moe_tool.formats.finite_numbers import are_finite
from moe_tool.formats.foreign_files import BEGINNING_BYTES, foreign_content, foreign_folder
from moe_tool.formats.hostile_file import open_plain_file, quoted, reading
from moe_tool.formats.shard_index import index_remarks, read_weight_map
from moe_tool.formats.strict_json import parse_json_object

MAX_HEADER_BYTES = 100_000_000
"""Largest header accepted, the safetensors library's own limit."""
_LENGTH_BYTES = 8
_DROP_CACHE_BYTES = 2**20
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes that torch has, by safetensors' name"""
_ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | {
    "U16": 2,
    "U64": 8,
    "C64": 8,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
AGAIN = "copy or download the file again"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Place, dtype and shape of one tensor."""

    name: str
    dtype: str
    """Dtype by safetensors' name: F32, BF16, F16, U8, ..."""
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Offset in bytes from the start of the file"""
    size_bytes: int

    def at_row(self, row: int | None) -> "TensorInfo":
        """Return the place of one slice along the first dimension; None: the whole tensor"""
        if row is None:
            return self
        size = self.size_bytes // self.shape[0]
        return replace(self, shape=self.shape[1:], offset=self.offset + row * size, size_bytes=size)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of one safetensors file, by name.

    Raises:
        NotFoundError: there is no such file.
        CorruptArtifactError: it is no safetensors file, truncated, or its header contradicts
            itself.
        StorageError: it cannot be read.
    """
    with (
        reading(path),
        open_plain_file(path, remedy=AGAIN, missing="check the path") as file,
    ):
        file_bytes = os.fstat(file.fileno()).st_size
        foreign = foreign_content(path, file.read(BEGINNING_BYTES))
        if foreign is not None:
            raise foreign
        file.seek(0)
        beginning = file.read(_LENGTH_BYTES)
        length = int.from_bytes(beginning, "little")
        beginning += file.read(min(length, MAX_HEADER_BYTES, file_bytes))
    return parse_header(path, beginning, file_bytes=file_bytes)


def parse_header(path: Path, beginning: bytes, *, file_bytes: int) -> dict[str, TensorInfo]:
    """Return the tensors of one safetensors file from its first bytes, length and header.

    Raises:
        CorruptArtifactError: as `read_header`.
    """
    if len(beginning) < _LENGTH_BYTES:
        raise _corrupt(
            f"{path} has {file_bytes} bytes, a safetensors file has at least {_LENGTH_BYTES}"
        )
    header_bytes = int.from_bytes(beginning[:_LENGTH_BYTES], "little")
    data_start = _LENGTH_BYTES + header_bytes
    if header_bytes > MAX_HEADER_BYTES or data_start > min(file_bytes, len(beginning)):
        raise _corrupt(
            f"{path} says its header has {header_bytes} bytes, the file has {file_bytes}: "
            "it is truncated or no safetensors file"
        )
    entries = parse_json_object(path, beginning[_LENGTH_BYTES:data_start], remedy=AGAIN)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _corrupt(f"{path}: its metadata are not strings")
    infos = {name: _parse_entry(path, name, each, data_start) for name, each in entries.items()}
    _require_tiling(path, infos, data_start=data_start, file_bytes=file_bytes)
    return infos


class Checkpoint:
    """Tensors of one or several safetensors files, every header checked, read by name."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Keep the checked headers; call `open_folder` or `open_files` instead."""
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(dict(sorted(tensors.items())))
        self.total_bytes = sum(info.size_bytes for info in tensors.values())
        self.bytes_read = 0
        self.format_name: str | None = None
        """Name of the format of quantized weights; None: plain floats"""
        self.on_read: Callable[[str, int | None, memoryview], None] | None = None
        """Callback on every read: tensor name, row if only one was read, bytes"""
        self.remarks: tuple[str, ...] = ()
        """Sentences on what the index and the files say differently"""
        self.requires_finite = False
        """Whether tensors with NaN or infinity are refused, as in a model's weights"""
        self.closes: list[Callable[[], None]] = []
        """Callbacks of `close`, for other readers of the files"""
        self._files: dict[Path, int] = {}

    @classmethod
    def open_folder(cls, folder: Path) -> "Checkpoint":
        """Open model.safetensors, or the shards that model.safetensors.index.json names.

        Reading a tensor with NaN or infinity is refused.

        Raises:
            NotFoundError: the folder holds neither.
            UnsupportedModelError: it holds weights in another form, e.g. pickled.
            CorruptArtifactError: index and shards contradict each other, or a shard is damaged.
        """
        with reading(folder):
            try:
                names = {entry.name for entry in os.scandir(folder)}
            except (FileNotFoundError, NotADirectoryError) as error:
                raise NotFoundError(
                    f"{folder} is not a folder", hint="give a checkpoint's folder"
                ) from error
        if _SINGLE in names:  # before the index, as in transformers
            checkpoint = cls(read_header(folder / _SINGLE))
        elif _INDEX in names:
            checkpoint = cls._open_sharded(folder, folder / _INDEX)
        elif any(name.endswith(_PICKLES) for name in names):
            raise UnsupportedModelError(
                f"{folder} holds only a pickled checkpoint, which is never read: "
                "pickles can run code",
                hint="convert it to safetensors, e.g. with transformers' save_pretrained",
            )
        else:
            raise foreign_folder(folder) or NotFoundError(
                f"{folder} holds neither model.safetensors nor model.safetensors.index.json",
                hint="download the checkpoint's safetensors files",
            )
        checkpoint.requires_finite = True
        return checkpoint

    @classmethod
    def open_files(cls, files: Sequence[Path]) -> "Checkpoint":
        """Open several files together; a tensor name in two of them is refused."""
        tensors: dict[str, TensorInfo] = {}
        for path in files:
            for name, info in read_header(path).items():
                if name in tensors:
                    raise _corrupt(
                        f"tensor {quoted(name)} lies in {tensors[name].file.name} and in {path}"
                    )
                tensors[name] = info
        return cls(tensors)

    @classmethod
    def _open_sharded(cls, folder: Path, index: Path) -> "Checkpoint":
        weight_map = read_weight_map(index)
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            if not (folder / shard).is_file():
                is_begun = (folder / f"{shard}.incomplete").is_file()
                state = "is downloaded only in part" if is_begun else "is not there"
                raise CorruptArtifactError(
                    f"{index} names the shard {shard}, which {state}",
                    hint="download the missing shard",
                )
        headers = {shard: read_header(folder / shard) for shard in shards}
        named = {
            name: headers[shard][name]
            for name, shard in weight_map.items()
            if name in headers[shard]
        }
        checkpoint = cls(named)
        checkpoint.remarks = index_remarks(index, weight_map, headers)
        return checkpoint

    def read(self, name: str, *, row: int | None = None) -> torch.Tensor:
        """Return one tensor, or one slice of it along the first dimension.

        Raises:
            CorruptArtifactError: the file became shorter, or it holds NaN or infinity and must not.
            UnsupportedModelError: torch has no such dtype.
            StorageError: the read fails.
        """
        info = self.tensors[name]
        if info.dtype not in DTYPES:
            raise UnsupportedModelError(
                f"{info.file}: tensor {quoted(name)} is stored as {info.dtype}, which is not read",
                hint="use a float32, bfloat16 or float16 version of the checkpoint",
            )
        slice_ = info.at_row(row)
        raw = torch.empty(slice_.size_bytes, dtype=torch.uint8)
        self._read_into(info, raw.numpy(), slice_.offset, row)
        return raw.view(DTYPES[info.dtype]).view(slice_.shape)

    @property
    def raw(self) -> "Checkpoint":
        """The tensors on disk; this object unless it decodes them"""
        return self

    def places(self, name: str, *, row: int | None = None) -> dict[str, TensorInfo]:
        """Return the tensors on disk that `read` makes a tensor or a row of, by role."""
        return {"values": self.tensors[name].at_row(row)}

    def read_bytes(self, name: str) -> bytes:
        """Return the bytes of one tensor, whatever its dtype.

        Raises:
            CorruptArtifactError, StorageError: as `read`.
        """
        info = self.tensors[name]
        data = bytearray(info.size_bytes)
        self._read_into(info, data, info.offset, None)
        return bytes(data)

    def copied(self, name: str) -> list[TensorInfo]:
        """Return the tensors on disk that a copy of a tensor needs."""
        return [self.tensors[name]]

    def read_copied(self, name: str) -> bytes:
        """Return the bytes of a tensor that `copied` named."""
        return self.read_bytes(name)

    def extra_bytes(self, name: str) -> int:
        """Return the bytes that reading a tensor holds beside it."""
        del name
        return 0

    def close_file(self, path: Path) -> None:
        """Close one file, which no thread may be reading."""
        handle = self._files.pop(path, None)
        if handle is not None:
            os.close(handle)

    def close(self) -> None:
        """Close the files; reading opens them again."""
        for close in self.closes:
            close()
        for file in self._files.values():
            os.close(file)
        self._files = {}

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_into(self, info: TensorInfo, target: Any, offset: int, row: int | None) -> None:
        view = memoryview(target).cast("B")
        done = 0
        try:
            if info.file not in self._files:
                self._files[info.file] = os.open(info.file, os.O_RDONLY)
            file = self._files[info.file]
            while done < len(view):
                count = os.preadv(file, [view[done:]], offset + done)
                if count == 0:
                    raise _corrupt(
                        f"{info.file} ended while {quoted(info.name)} was read: "
                        f"{done} of {len(view)} bytes"
                    )
                done += count
            if len(view) >= _DROP_CACHE_BYTES:  # under a memory limit the page cache counts too
                os.posix_fadvise(file, offset, len(view), os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise StorageError(
                f"{info.file}: {error.strerror or error} while {quoted(info.name)} was read",
                hint="check the disk",
            ) from error
        self.bytes_read += len(view)
        if self.on_read is not None:
            self.on_read(info.name, row, view)
        is_checked = self.requires_finite and len(view) > 0 and info.dtype in DTYPES
        if is_checked and not are_finite(torch.frombuffer(view, dtype=DTYPES[info.dtype])):
            where = "" if row is None else f" (row {row})"
            raise CorruptArtifactError(
                f"{info.file}: tensor {quoted(info.name)}{where} holds NaN or infinity",
                hint=f"{AGAIN}; if it was published like that, use another version of the model",
            )


def _corrupt(complaint: str) -> CorruptArtifactError:
    return CorruptArtifactError(complaint, hint=AGAIN)


def _parse_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    def refuse(reason: str) -> CorruptArtifactError:
        return _corrupt(f"{path}: tensor {quoted(name)} {reason}")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse("is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise refuse(f"has the unknown dtype {quoted(dtype)}")
    if not _is_counts(shape) or len(shape) > 16:
        raise refuse("has a shape that is not a list of sizes")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse("has offsets that are not a range")
    needed, size = math.prod(shape) * _ITEM_BYTES[dtype], offsets[1] - offsets[0]
    if needed != size:
        raise refuse(f"of shape {shape} and dtype {dtype} needs {needed} bytes, has {size}")
    return TensorInfo(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        file=path,
        offset=data_start + offsets[0],
        size_bytes=size,
    )


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**56 for x in value
    )


def _require_tiling(
    path: Path, infos: Mapping[str, TensorInfo], *, data_start: int, file_bytes: int
) -> None:
    """Refuse holes, overlaps and bytes after the last tensor."""
    position = data_start
    for info in sorted(infos.values(), key=lambda i: (i.offset, i.size_bytes)):
        if info.offset != position:
            overlaps = info.offset < position
            what = "overlaps the tensor before it" if overlaps else "lies behind a hole"
            raise _corrupt(f"{path}: tensor {quoted(info.name)} {what}")
        position += info.size_bytes
    if position != file_bytes:
        what = "truncated" if file_bytes < position else "longer than its header says"
        raise _corrupt(f"{path} is {what}: wanted {position} bytes, found {file_bytes}")
