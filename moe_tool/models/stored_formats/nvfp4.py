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
from moe_tool.quantization.kept_codes import KeptWeight

_GROUP = 16


def nvfp4_matrix(
    codes: TensorInfo, scale: TensorInfo, whole: TensorInfo, *, is_divisor: bool
) -> StoredTensor:
    """Return a matrix of codes [out, in / 2] and scales [out, in / 16].

    A weight is code * (scale * scale of the whole), in float32.

    Args:
        codes: two in a byte, the even input in the low bits.
        scale: FP8.
        whole: one float32.
        is_divisor: whether scales are divided by `whole`.

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
        scales, factor = parts["scale"].to(torch.float32), parts["whole"].reshape(())
        scales = scales / factor if is_divisor else scales * factor
        return scale_groups(look_up(parts["codes"], E2M1), scales, (1, _GROUP))

    def keep(parts: Parts) -> KeptWeight:
        return KeptWeight(
            codes=parts["codes"],
            kind="e2m1",
            scale=parts["scale"],
            group=(1, _GROUP),
            global_scale=parts["whole"].reshape(1).repeat(n_out),
            is_divisor=is_divisor,
        )

    return StoredTensor(
        parts={"codes": codes.name, "scale": scale.name, "whole": whole.name},
        shape=(n_out, n_in),
        decode=decode,
        keep=keep,
        decode_bytes=lookup_bytes(codes.size_bytes, n_out * n_in) + 9 * scale.size_bytes + 8,
    )
