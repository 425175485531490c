"""Description of kept codes for the compiled kernels."""

import struct

import torch

from moe_tool.quantization.kept_codes import KeptWeight

_CODES = {"e2m1": 0, "int4": 1, "nf4": 2, "e4m3": 3, "int8": 4}
_SCALES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.uint8: 3,
    torch.float8_e4m3fn: 4,
}
_FLOAT_ZERO, _DIVISOR, _INTEGERS = 1, 2, 4
_KEPT_FORM = 2
SHORT_GROUPS = (16, 32, 64)
"""Columns of a group beside multiples of 128 and whole rows"""
INTEGER_KINDS = frozenset({"e2m1", "int4", "int8"})
"""Codes whose products with int8 tokens are sums of integers"""


def pack_kept(weight: KeptWeight, bias_at: int, *, int8_tokens: bool = False) -> bytes:
    """Return the description; valid while the weight's tensors stay where they are.

    Args:
        weight: the matrix; its constructor has checked the shapes.
        bias_at: address of the float32 bias, 0 if there is none.
        int8_tokens: round tokens to int8, where the codes allow it.

    Raises:
        ValueError: a part is not contiguous, or its groups are not those of the kernels.
    """
    n_out, n_in = weight.shape
    rows, columns = weight.group
    if not is_computed(columns, n_in):
        raise ValueError(f"a group of {columns} inputs is not one of the kernels'")
    parts = (weight.codes, weight.scale, weight.zero, weight.global_scale)
    if any(part is not None and not part.is_contiguous() for part in parts):
        raise ValueError("a part of kept codes is not contiguous")
    at = [0 if part is None else part.data_ptr() for part in parts]
    flags = _DIVISOR * weight.is_divisor + _INTEGERS * (
        int8_tokens and weight.kind in INTEGER_KINDS
    )
    if weight.zero is not None and weight.zero.dtype == torch.float32:
        flags |= _FLOAT_ZERO
    return struct.pack(
        "=8Q8i",
        *at, 0, 0, 0, bias_at,
        n_out, n_in, _CODES[weight.kind], columns, _SCALES[weight.scale.dtype], _KEPT_FORM,
        rows, flags,
    )  # fmt: skip


def is_computed(columns: int, n_inputs: int) -> bool:
    """Return whether the kernels know groups of so many of a row's inputs."""
    return columns in SHORT_GROUPS or columns % 128 == 0 or columns >= n_inputs


def token_group(columns: int) -> int:
    """Return the inputs of a token that share a scale when it is rounded to int8."""
    return columns if columns in SHORT_GROUPS else 128
