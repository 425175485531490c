"""FP8 weights with a scale for a block, a channel or the whole matrix, as DeepSeek-V3 has them."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from moe_tool.formats.safetensors_index import TensorInfo
from moe_tool.models.stored_formats.code_values import scale_groups
from moe_tool.models.stored_formats.mxfp4 import mxfp4_matrix
from moe_tool.models.stored_formats.stored_tensor import (
    Parts,
    StoredTensor,
    refused,
    require_dtype,
    unread_setting,
)
from moe_tool.quantization.kept_codes import KeptWeight

SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
_CODE_DTYPES = ("F8_E4M3", "F8_E5M2")
_SUFFIXES = ("_scale_inv", "_scale")
_V4_SUFFIX = ".scale"
"""DeepSeek-V4 has X.weight and X.scale"""


def stored_tensors(
    raw: Mapping[str, TensorInfo], settings: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """Return the weights of an FP8 checkpoint, also with DeepSeek-V4's 4-bit experts.

    Raises:
        UnsupportedModelError: the settings are not built.
        CorruptArtifactError: codes and scales do not fit together.
    """
    size = settings.get("weight_block_size")
    block = None if size is None else block_size("fp8", "weight_block_size", size)
    found = {}
    for name, info in raw.items():
        scale = _scale_of(raw, name)
        if scale is not None and info.dtype in ("I8", "U8"):
            found[name] = mxfp4_matrix(info, scale)
        elif scale is not None and info.dtype in _CODE_DTYPES:
            found[name] = fp8_tensor(info, scale, block)
        elif info.dtype in _CODE_DTYPES:
            raise refused(info, "holds FP8 codes without a scale")
    return found


def fp8_tensor(codes: TensorInfo, scale: TensorInfo, block: tuple[int, int] | None) -> StoredTensor:
    """Return a weight of FP8 codes [out, in], or [E, out, in] with scales of each expert.

    Args:
        codes: FP8.
        scale: for a block, an output channel or the whole matrix; its shape tells which.
        block: rows and columns of a block, if scales may be for blocks.

    Raises:
        CorruptArtifactError: they do not fit together.
    """
    require_dtype(codes, *_CODE_DTYPES)
    require_dtype(scale, *SCALE_DTYPES)
    group, grid = scale_grid(codes, codes.shape, scale, block)
    n_out, n_in = codes.shape[-2:]

    def decode(parts: Parts) -> torch.Tensor:
        values = parts["codes"].to(torch.float32)
        return scale_groups(values, parts["scale"].to(torch.float32).view(grid), group)

    def keep(parts: Parts) -> KeptWeight:
        scales = parts["scale"].view(grid)
        is_power = scales.dtype == torch.float8_e8m0fnu
        return KeptWeight(
            codes=parts["codes"].view(torch.uint8),
            kind="e4m3",
            scale=scales.view(torch.uint8) if is_power else scales,
            group=group,
        )

    return StoredTensor(
        parts={"codes": codes.name, "scale": scale.name},
        shape=codes.shape,
        decode=decode,
        keep=keep if codes.dtype == "F8_E4M3" else None,
        decode_bytes=5 * n_out * n_in + 8 * math.prod(grid),
        is_stacked=len(codes.shape) == 3,
    )


def scale_grid(
    codes: TensorInfo, shape: tuple[int, ...], scale: TensorInfo, block: tuple[int, int] | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the group of a matrix's scales, and how many there are in both directions.

    Args:
        codes: named in errors.
        shape: shape of the weights.
        scale: one for each expert's matrix, or for each output channel, or for each block.
        block: rows and columns of a block; None if scales are not for blocks.

    Raises:
        CorruptArtifactError: no kind of group has so many scales.
    """
    one, of_scale = shape, scale.shape
    if len(shape) == 3 and of_scale[:1] == shape[:1]:
        one, of_scale = shape[1:], of_scale[1:]
    if len(one) != 2 or 0 in one:
        raise refused(codes, f"has scales, but its shape {list(shape)} is no matrix's")
    n_out, n_in = one
    if math.prod(of_scale) == 1:
        return (n_out, n_in), (1, 1)
    if of_scale in ((n_out,), (n_out, 1)):
        return (1, n_in), (n_out, 1)
    step = (n_out, n_in) if block is None else block
    halves = (2, -(-n_in // step[1]))
    if len(shape) == 3 and of_scale == halves and n_out % 2 == 0 and n_out <= step[0]:
        return (n_out // 2, step[1]), halves  # gate and up, coded apart and then stacked
    wanted = f"1 or {[n_out, 1]}"
    if block is not None:
        grid = (-(-n_out // block[0]), -(-n_in // block[1]))
        if of_scale == grid:
            return block, grid
        wanted += f" or {list(grid)} for blocks of {list(block)}"
    raise refused(scale, f"has shape {list(scale.shape)}, a matrix {list(one)} wants {wanted}")


def block_size(format_name: str, setting: str, value: object) -> tuple[int, int]:
    """Return rows and columns of a block from a setting.

    Raises:
        UnsupportedModelError: it is not two sizes.
    """
    if (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(x, int) and not isinstance(x, bool) and 0 < x < 2**31 for x in value)
    ):
        return value[0], value[1]
    raise unread_setting(format_name, setting, value)


def _scale_of(raw: Mapping[str, TensorInfo], name: str) -> TensorInfo | None:
    names = [name + suffix for suffix in _SUFFIXES]
    if name.endswith(".weight"):
        names.append(name.removesuffix(".weight") + _V4_SUFFIX)
    return next((raw[each] for each in names if each in raw), None)
