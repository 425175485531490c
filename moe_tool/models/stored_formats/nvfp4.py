"""NVFP4: 4-bit floats, an FP8 scale for 16 of them, and one float32 scale for the matrix."""

import torch

from moe_tool.formats.safetensors_index import TensorInfo
from moe_tool.models.stored_formats.code_values import E2M1, look_up, lookup_bytes, scale_groups
from moe_tool.models.stored_formats.stored_tensor import (
    Parts,
    StoredTensor,
    refused,
    require_dtype,
    require_shape,
)

_GROUP = 16


def nvfp4_matrix(
    codes: TensorInfo, scale: TensorInfo, whole: TensorInfo, *, is_divisor: bool
) -> StoredTensor:
    """Return a matrix of codes [out, in / 2] and scales [out, in / 16].

    A weight is code * scale, which float32 holds exactly, times the scale of the whole.

    Args:
        codes: two in a byte, the even input in the low bits.
        scale: FP8.
        whole: one float32.
        is_divisor: whether `whole` is what the weights were multiplied by when they were coded.

    Raises:
        CorruptArtifactError: they do not fit together.
    """
    require_dtype(codes, "U8")
    require_dtype(scale, "F8_E4M3")
    require_dtype(whole, "F32")
    if len(codes.shape) != 2 or 0 in codes.shape or 2 * codes.shape[1] % _GROUP:
        raise refused(codes, f"has shape {list(codes.shape)}: no groups of {_GROUP} codes")
    n_out, n_in = codes.shape[0], 2 * codes.shape[1]
    require_shape(scale, (n_out, n_in // _GROUP))
    require_shape(whole, (), (1,))

    def decode(parts: Parts) -> torch.Tensor:
        values = look_up(parts["codes"], E2M1)
        scale_groups(values, parts["scale"].to(torch.float32), (1, _GROUP))
        factor = parts["whole"].reshape(())
        return values.mul_(1 / factor if is_divisor else factor)

    return StoredTensor(
        parts={"codes": codes.name, "scale": scale.name, "whole": whole.name},
        shape=(n_out, n_in),
        decode=decode,
        decode_bytes=lookup_bytes(codes.size_bytes, n_out * n_in) + 5 * scale.size_bytes + 8,
    )
