"""Bytes of a tensor in pieces, so that no table has to fit into memory."""

import os
from collections.abc import Iterator

import torch
import xxhash

from moe_tool.errors import CorruptArtifactError, StorageError
from moe_tool.formats.bundle_checks import REPACK, corrupt_bundle
from moe_tool.formats.finite_numbers import are_finite
from moe_tool.formats.hostile_file import quoted
from moe_tool.formats.safetensors_index import AGAIN, DTYPES, TensorInfo

PIECE_BYTES = 4 * 2**20


def stream_tensor(
    info: TensorInfo, *, requires_finite: bool = False, remedy: str = AGAIN
) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in pieces of 4 MiB, each valid until the next one.

    Args:
        requires_finite: whether NaN and infinity are refused.
        remedy: hint of the error on a file that is too short.

    Raises:
        CorruptArtifactError: the file became shorter, or holds NaN or infinity and must not.
        StorageError: the disk does not give it.
    """
    piece = memoryview(bytearray(min(PIECE_BYTES, info.size_bytes)))
    try:
        file = os.open(info.file, os.O_RDONLY)
    except OSError as error:
        raise _disk_error(info, error) from error
    try:
        for begin in range(0, info.size_bytes, PIECE_BYTES):
            view = piece[: min(PIECE_BYTES, info.size_bytes - begin)]
            fill(file, info, view, info.offset + begin, remedy=remedy)
            # Under a memory limit the page cache counts too.
            os.posix_fadvise(file, info.offset + begin, len(view), os.POSIX_FADV_DONTNEED)
            if requires_finite:
                require_finite(info, view)
            yield view
    finally:
        os.close(file)


def stream_hashed(info: TensorInfo, xxh3: str) -> Iterator[memoryview]:
    """Yield the bytes of a bundle's tensor as `stream_tensor` does, and compare them with their
    hash at the end.

    Args:
        xxh3: the xxh3-64 of all its bytes, hex.

    Raises:
        CorruptArtifactError: they are others.
        StorageError: the disk does not give them.
    """
    digest = xxhash.xxh3_64()
    for piece in stream_tensor(info, remedy=REPACK):
        digest.update(piece)
        yield piece
    if digest.hexdigest() != xxh3:
        raise corrupt_bundle(
            f"{info.file} is damaged: the hash of {quoted(info.name)} does not fit"
        )


def fill(file: int, info: TensorInfo, view: memoryview, offset: int, *, remedy: str) -> None:
    """Read bytes of a tensor from an open file.

    Raises:
        CorruptArtifactError, StorageError: as `stream_tensor`.
    """
    done = 0
    try:
        while done < len(view):
            count = os.preadv(file, [view[done:]], offset + done)
            if count == 0:
                raise CorruptArtifactError(
                    f"{info.file} ended while {quoted(info.name)} was read", hint=remedy
                )
            done += count
    except OSError as error:
        raise _disk_error(info, error) from error


def require_finite(info: TensorInfo, view: memoryview) -> None:
    """Refuse NaN and infinity among whole numbers of a tensor of a checkpoint.

    Raises:
        CorruptArtifactError: there is one.
    """
    if len(view) and not are_finite(torch.frombuffer(view, dtype=DTYPES[info.dtype])):
        raise CorruptArtifactError(
            f"{info.file}: tensor {quoted(info.name)} holds NaN or infinity",
            hint=f"{AGAIN}; if it was published like that, use another version of the model",
        )


def _disk_error(info: TensorInfo, error: OSError) -> StorageError:
    return StorageError(
        f"{info.file}: {error.strerror or error} while {quoted(info.name)} was read",
        hint="check the disk",
    )
