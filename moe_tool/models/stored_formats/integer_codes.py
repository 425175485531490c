"""Integer weights with scales and zero points, as compressed-tensors packs them."""

import math
from dataclasses import dataclass

import torch

from moe_tool.formats.safetensors_index import TensorInfo
from moe_tool.models.stored_formats.code_values import look_up, scale_groups
from moe_tool.models.stored_formats.fp8 import scale_grid
from moe_tool.models.stored_formats.stored_tensor import (
    Parts,
    StoredTensor,
    refused,
    require_dtype,
    require_shape,
)
from moe_tool.quantization.kept_codes import KeptWeight

_WORD_BITS = 32
_SCALE_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerParts:
    """Headers of one weight's parts, and how its codes lie in them."""

    codes: TensorInfo
    scale: TensorInfo
    zero: TensorInfo | None
    """Code of zero for each scale; None: the middle code"""
    order: TensorInfo | None
    """Group of each input; None: inputs lie group by group"""
    width_bits: int
    is_packed: bool
    """Whether codes lie in 32-bit words along the inputs, lowest bits first, and zero points along
    the outputs; otherwise each is one signed byte"""


def integer_tensor(parts: IntegerParts, block: tuple[int, int] | None) -> StoredTensor:
    """Return a weight (code - zero) * scale of integer codes [out, in].

    Args:
        parts: the headers.
        block: rows and columns of a group, unless scales are for channels or for the whole.

    Raises:
        CorruptArtifactError: they do not fit together.
    """
    codes, scale = parts.codes, parts.scale
    per_word = _WORD_BITS // parts.width_bits if parts.is_packed else 1
    require_dtype(codes, "I32" if parts.is_packed else "I8")
    require_dtype(scale, *_SCALE_DTYPES)
    if len(codes.shape) != 2:
        raise refused(codes, f"has shape {list(codes.shape)}, which is no matrix's")
    n_out, n_in = codes.shape[0], codes.shape[1] * per_word
    group, grid = scale_grid(codes, (n_out, n_in), scale, block)
    if group[0] == 1 and n_in % group[1]:
        raise refused(codes, f"has {n_in} inputs, which groups of {group[1]} do not divide")
    _require_fit(parts, grid, n_in=n_in, per_word=per_word)
    found = {"codes": codes, "scale": scale, "zero": parts.zero, "order": parts.order}
    names = {role: info.name for role, info in found.items() if info is not None}

    def decode(read: Parts) -> torch.Tensor:
        values = _values(read["codes"], parts)
        scales = read["scale"].to(torch.float32).view(grid)
        zeros = _zeros(read["zero"], parts, grid) if "zero" in read else None
        order = read.get("order")
        if order is None or bool((order == -1).all()):
            return scale_groups(values, scales, group, zero=zeros)
        if int(order.min()) < 0 or int(order.max()) >= grid[1] or grid[0] != n_out:
            raise refused(codes, f"has inputs of groups beyond its {grid[1]}")
        if zeros is not None:
            values.sub_(zeros[:, order.long()])
        return values.mul_(scales[:, order.long()])

    def keep(read: Parts) -> KeptWeight:
        zero = read.get("zero")
        return KeptWeight(
            codes=_bytes(read["codes"], parts),
            kind="int4" if parts.width_bits == 4 else "int8",
            scale=read["scale"].view(grid),
            group=group,
            zero=None if zero is None else _zeros(zero, parts, grid).to(torch.uint8).contiguous(),
        )

    gathered = 0 if parts.order is None else 4 * n_out * n_in + 16 * n_in
    return StoredTensor(
        parts=names,
        shape=(n_out, n_in),
        decode=decode,
        keep=keep if parts.order is None and parts.width_bits in (4, 8) else None,
        decode_bytes=6 * codes.size_bytes + 4 * n_out * n_in + 16 * math.prod(grid) + gathered,
    )


def _require_fit(parts: IntegerParts, grid: tuple[int, int], *, n_in: int, per_word: int) -> None:
    """Refuse zero points and an order of inputs that are not those of the codes."""
    if parts.zero is not None:
        require_dtype(parts.zero, "I32" if parts.is_packed else "I8")
        rows = -(-grid[0] // per_word)
        require_shape(parts.zero, (rows, grid[1]), *([(rows,)] if grid[1] == 1 else []))
    if parts.order is not None:
        require_dtype(parts.order, "I32", "I64")
        require_shape(parts.order, (n_in,))


def _bytes(codes: torch.Tensor, parts: IntegerParts) -> torch.Tensor:
    """Return codes as unsigned bytes, low bits first; signed bytes become codes with zero at 128"""
    return codes.view(torch.uint8) if parts.is_packed else codes.view(torch.uint8) ^ 128


def _values(codes: torch.Tensor, parts: IntegerParts) -> torch.Tensor:
    """Return codes less the middle one, or as they are if there are zero points."""
    middle = 0 if parts.zero is not None else 2 ** (parts.width_bits - 1)
    table = torch.arange(2**parts.width_bits, dtype=torch.float32) - middle
    return look_up(_bytes(codes, parts), table)


def _zeros(zero: torch.Tensor, parts: IntegerParts, grid: tuple[int, int]) -> torch.Tensor:
    table = torch.arange(2**parts.width_bits, dtype=torch.float32)
    if not parts.is_packed:
        return look_up(_bytes(zero.view(grid), parts), table)
    return look_up(zero.view(-1, grid[1]).T.contiguous().view(torch.uint8), table)[:, : grid[0]].T
