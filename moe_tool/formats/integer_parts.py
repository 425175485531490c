"""Stored tensors of a quantized matrix: NAME.plane0, NAME.plane1, ..., NAME.scales, zero points
NAME.zeros if it has any, and NAME.base_scales if it is nested."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_tool.artifacts.precision import IntegerPrecision
from moe_tool.quantization.bit_packing import ROWS, n_row_blocks, plane_bytes, plane_widths
from moe_tool.quantization.weights import BASE_SCALES, PLANE, SCALES, ZEROS, IntegerWeight

_EXPONENT = 0x7C00
"""Exponent bits of float16, all set in NaN and infinity"""
_DTYPES = {"uint8": torch.uint8, "float16": torch.float16}
_SAFETENSORS = {"uint8": "U8", "float16": "F16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerPart:
    """Name, dtype and shape of one stored tensor."""

    name: str
    dtype: str
    """Dtype: uint8 or float16"""
    shape: tuple[int, ...]
    is_refinement: bool = False
    """Whether the base of a nested matrix does not use the tensor"""

    @property
    def safetensors_dtype(self) -> str:
        """Name of the dtype in a safetensors header."""
        return _SAFETENSORS[self.dtype]

    @property
    def size_bytes(self) -> int:
        """Size without padding."""
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize

    @property
    def is_factor(self) -> bool:
        """Whether the tensor holds scales or zero points, which have to be finite."""
        return is_factor(self.name)


def integer_parts(
    name: str, n_outputs: int, n_inputs: int, precision: IntegerPrecision
) -> tuple[IntegerPart, ...]:
    """Return the stored tensors of a matrix [n_outputs, n_inputs], planes first."""
    is_nested = precision.base_bits is not None
    parts: list[tuple[str, str, tuple[int, ...], bool]] = [
        (f"{PLANE}{index}", "uint8", (plane_bytes(n_outputs, n_inputs, bits),), index > 0)
        for index, bits in enumerate(plane_widths(precision.width_bits))
    ]
    shape = (n_row_blocks(n_outputs), -(-n_inputs // precision.group), ROWS)
    factors = [SCALES] + [ZEROS] * precision.zeros + [BASE_SCALES] * is_nested
    parts += [(factor, "float16", shape, factor == SCALES) for factor in factors]
    return tuple(
        IntegerPart(
            name=f"{name}.{part}",
            dtype=dtype,
            shape=extents,
            is_refinement=is_nested and is_refined,
        )
        for part, dtype, extents, is_refined in parts
    )


def is_factor(name: str) -> bool:
    """Return whether a part of this name holds scales or zero points."""
    return name.endswith((f".{SCALES}", f".{ZEROS}", f".{BASE_SCALES}"))


def join_integer_parts(
    name: str,
    n_outputs: int,
    n_inputs: int,
    precision: IntegerPrecision,
    read: Callable[[str], torch.Tensor],
) -> IntegerWeight:
    """Return the matrix made of its stored tensors without copying.

    Args:
        read: returns a tensor by its name, with the dtype and shape of `integer_parts`.
    """
    parts = integer_parts(name, n_outputs, n_inputs, precision)
    return IntegerWeight(
        planes=tuple(read(part.name) for part in parts if not part.is_factor),
        scales=read(f"{name}.{SCALES}"),
        zeros=read(f"{name}.{ZEROS}") if precision.zeros else None,
        base_scales=None if precision.base_bits is None else read(f"{name}.{BASE_SCALES}"),
        width_bits=precision.width_bits,
        of_bits=precision.of_bits,
        group=precision.group,
        n_outputs=n_outputs,
        n_inputs=n_inputs,
    )


def are_finite(scales: torch.Tensor) -> bool:
    """Return whether no float16 number is NaN or infinite.

    Checking the bits takes a ninth of torch's time and wakes no other thread.
    """
    bits = scales.view(torch.int16).numpy()
    return not bool(((bits & _EXPONENT) == _EXPONENT).any())
