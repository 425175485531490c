"""Python side of the compiled kernels, if they were built and this processor can run them.

`MOE_TOOL_KERNELS` forces one implementation: avx512vnni, avx512, avx2, scalar, or torch for none.
"""

import os
import struct
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from moe_tool.errors import UsageError
from moe_tool.native.kept import pack_kept
from moe_tool.quantization.bit_packing import INPUTS, plane_bytes, plane_widths
from moe_tool.quantization.kept_codes import KeptWeight
from moe_tool.quantization.pair_lookup import (
    QUAD,
    TILE_ROWS,
    PairTables,
    PairTokens,
    PairWeights,
    check_pair_product,
    look_up_pairs,
)
from moe_tool.quantization.weights import AnyWeight, FloatWeight, IntegerWeight

ENVIRONMENT = "MOE_TOOL_KERNELS"
NAMES = ("avx512vnni", "avx512", "avx2", "scalar")
"""Kernel variants, the fastest first."""
_TORCH = "torch"
FLOAT_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3, "relu2": 4, "clamped_swiglu": 5}

try:
    from moe_tool.native import _kernels as _compiled  # type: ignore[attr-defined]
except ImportError:  # no compiler when the tool was installed
    _compiled = None
_tokens_are_int8 = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Activation between an expert's first and last matrix."""

    activation: str
    """Name: silu, gelu (erf), gelu_tanh, relu, relu2, or clamped_swiglu as in gpt_oss"""
    gated: bool
    """Whether act(gate) * up is computed instead of act(up)"""
    interleaved: bool = False
    """Whether gate and up rows alternate, instead of gate first, then up"""
    alpha: float = 1.0
    limit: float = 0.0
    packed: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Pack the fields for the kernels."""
        code = _ACTIVATIONS[self.activation]
        packed = struct.pack("=3i2f", code, self.gated, self.interleaved, self.alpha, self.limit)
        object.__setattr__(self, "packed", packed)


@cache
def kernels_in_use() -> str:
    """Return avx512vnni, avx512, avx2, scalar or torch; decided once per process.

    Raises:
        UsageError: `MOE_TOOL_KERNELS` names kernels that this installation or processor lacks.
    """
    wanted = os.environ.get(ENVIRONMENT, "")
    if wanted == _TORCH or (not wanted and _compiled is None):
        return _TORCH
    if not wanted:
        name: str = _compiled.in_use()
        return name
    if wanted not in NAMES:
        raise UsageError(
            f"{ENVIRONMENT}={wanted} is not known", hint=f"use {', '.join(NAMES)} or {_TORCH}"
        )
    if _compiled is None:
        raise UsageError(
            f"{ENVIRONMENT}={wanted}: the native kernels were not built",
            hint="reinstall moe-tool on a system with g++",
        )
    if not _compiled.use(wanted):
        raise UsageError(
            f"{ENVIRONMENT}={wanted}: this processor lacks the instructions",
            hint="leave it unset to use the fastest kernels that work",
        )
    return wanted


def is_built() -> bool:
    """Return whether this installation has compiled kernels."""
    return _compiled is not None


def compiled() -> Any:
    """Return the compiled module; valid if `is_native`."""
    return _compiled


def is_native() -> bool:
    """Return whether compiled kernels are used."""
    return kernels_in_use() != _TORCH


def set_threads(n_threads: int) -> None:
    """Set the number of threads of all later products; results do not change."""
    if _compiled is not None:
        _compiled.set_threads(n_threads)


def use_lookup(bits: int, max_tokens: int) -> bool:
    """Use table lookup for products of 1- or 2-bit weights with up to so many tokens; 0: never.

    Results are bit-identical. Returns False if no such kernel exists.
    """
    return is_native() and bool(_compiled.use_lookup(bits, max_tokens))


def round_tokens(to_int8: bool) -> None:
    """Round tokens to int8 for products with experts' kept codes that allow it; else they stay
    floats.

    Applies to whatever is described afterwards, with the kernels and with torch.
    """
    global _tokens_are_int8
    _tokens_are_int8 = to_int8


def are_tokens_int8() -> bool:
    """Return what `round_tokens` has been told."""
    return _tokens_are_int8


def decode_kept(weight: KeptWeight, first: int, stop: int) -> torch.Tensor:
    """Return rows [first, stop) in float32, the same numbers as `KeptWeight.decode`."""
    out = torch.empty(stop - first, weight.shape[1])
    _compiled.decode(pack_kept(weight, 0), first, stop, out.data_ptr())
    return out


def pair_product(weights: PairWeights, tokens: PairTokens, tables: PairTables) -> torch.Tensor:
    """Return the exact integer products, int32 [n, out].

    Raises:
        ValueError: the sides do not fit together, or a sum may not fit into 32 bits.
    """
    check_pair_product(weights, tokens, tables)
    n_quads = -(-weights.n_inputs // QUAD)
    n_tokens = tokens.codes.shape[0]
    shapes = (
        (weights.codes, (-(-weights.n_outputs // TILE_ROWS), n_quads, TILE_ROWS)),
        (tokens.codes, (n_tokens, 2 * n_quads)),
        (tables.planes, (tables.planes.shape[0], 16, 16)),
    )
    for part, shape in shapes:
        if part.dtype != torch.uint8 or tuple(part.shape) != shape or not part.is_contiguous():
            raise ValueError(f"a part is {part.dtype} {tuple(part.shape)}, wanted uint8 {shape}")
    if not is_native():
        return look_up_pairs(weights, tokens, tables)
    widenings = tables.quads_per_widening
    described = struct.pack(
        "=Q5iI",
        tables.planes.data_ptr(), len(widenings), tables.digit_bits,
        *widenings, *[1] * (3 - len(widenings)), tables.base(weights.n_inputs) % 2**32,
    )  # fmt: skip
    out = torch.empty(n_tokens, weights.n_outputs, dtype=torch.int32)
    _compiled.pair_product(
        weights.codes.data_ptr(), weights.n_outputs, n_quads,
        tokens.codes.data_ptr(), n_tokens, described, out.data_ptr(),
    )  # fmt: skip
    return out


class NativeLinear:
    """Matrix described once for the kernels, as `NativeExpert` describes two."""

    __slots__ = ("_described", "_n_inputs", "_n_outputs")

    def __init__(
        self, weight: AnyWeight, bias: FloatWeight | None, *, int8_tokens: bool = False
    ) -> None:
        """Check and describe the matrix.

        Args:
            weight: [out, in].
            bias: [out], any float dtype.
            int8_tokens: round tokens before they meet kept codes, where these allow it.

        Raises:
            ValueError: its planes, scales or bias do not fit its shape.
        """
        self._described = _Described(weight, bias, int8_tokens=int8_tokens)
        self._n_outputs, self._n_inputs = weight.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ weight.T + bias in float32, [n, out]; x is [n, in] float32."""
        x = _checked(x, self._n_inputs)
        n_tokens = x.shape[0]
        out = torch.empty(n_tokens, self._n_outputs)
        if n_tokens:
            self._described.refresh()
            _compiled.linear(self._described.packed, x.data_ptr(), n_tokens, out.data_ptr())
        return out


class NativeExpert:
    """Weights of an expert described once for the kernels.

    The description stays valid while the weights' memory stays in place, whatever is written there:
    it is made once per slot, which saves 10 us per use.
    """

    __slots__ = ("_first", "_n_inputs", "_n_outputs", "_second")

    def __init__(
        self,
        first: AnyWeight,
        first_bias: FloatWeight | None,
        second: AnyWeight,
        second_bias: FloatWeight | None,
    ) -> None:
        """Check and describe the weights.

        Raises:
            ValueError: their planes, scales or biases do not fit their shapes.
        """
        self._first = _Described(first, first_bias, int8_tokens=are_tokens_int8())
        self._second = _Described(second, second_bias, int8_tokens=are_tokens_int8())
        self._n_inputs, self._n_outputs = first.shape[1], second.shape[0]

    def forward(self, x: torch.Tensor, gate: Gate) -> torch.Tensor:
        """Return the expert's output, float32 [n, H]; x is [n, H] float32."""
        x = _checked(x, self._n_inputs)
        n_tokens = x.shape[0]
        out = torch.empty(n_tokens, self._n_outputs)
        if n_tokens:
            first, second = self._first, self._second
            first.refresh()
            second.refresh()
            _compiled.expert(
                first.packed, gate.packed, second.packed, x.data_ptr(), n_tokens, out.data_ptr()
            )
        return out


def _checked(x: torch.Tensor, n_inputs: int) -> torch.Tensor:
    if x.dtype != torch.float32 or x.ndim != 2 or x.shape[1] != n_inputs:
        raise ValueError(f"tokens are {x.dtype} {tuple(x.shape)}, wanted float32 [n, {n_inputs}]")
    return x.contiguous()


class _Described:
    """Packed description of a weight for the kernels; keeps the memory it points to alive."""

    __slots__ = ("_bias", "_narrow_bias", "_weight", "packed")

    def __init__(self, weight: AnyWeight, bias: FloatWeight | None, *, int8_tokens: bool) -> None:
        n_out, n_in = weight.shape
        self._weight = weight
        self._bias = None if bias is None else bias.values.to(torch.float32).contiguous()
        is_copy = bias is not None and self._bias is not bias.values
        self._narrow_bias = bias.values if bias is not None and is_copy else None
        bias_at = 0
        if self._bias is not None:
            if self._bias.shape != (n_out,):
                raise ValueError(f"a bias of {tuple(self._bias.shape)} for {n_out} outputs")
            bias_at = self._bias.data_ptr()
        if isinstance(weight, IntegerWeight):
            self.packed = _pack_integer(weight, bias_at)
            return
        if isinstance(weight, KeptWeight):
            self.packed = pack_kept(weight, bias_at, int8_tokens=int8_tokens)
            return
        values: Any = weight.values
        if not values.is_contiguous():
            raise ValueError("a weight is not contiguous")
        kind = FLOAT_KINDS[values.dtype]
        self.packed = struct.pack(
            "=8Q8i",
            *[0] * 6, values.data_ptr(), bias_at,
            n_out, n_in, 0, 0, kind, 0, 0, 0,
        )  # fmt: skip

    def refresh(self) -> None:
        """Update the float32 copy of a bias that is stored in another dtype."""
        if self._narrow_bias is not None and self._bias is not None:
            self._bias.copy_(self._narrow_bias)


def _pack_integer(weight: IntegerWeight, bias_at: int) -> bytes:
    n_out, n_in = weight.shape
    widths = plane_widths(weight.width_bits)
    if len(weight.planes) != len(widths) or weight.group % INPUTS:
        raise ValueError("a weight's planes or group do not fit its width")
    for plane, bits in zip(weight.planes, widths, strict=True):
        if plane.numel() != plane_bytes(n_out, n_in, bits) or not plane.is_contiguous():
            raise ValueError("a plane has the wrong size")
    n_scales = -(-n_out // 16) * -(-n_in // weight.group) * 16
    for factors in (weight.scales, weight.zeros):
        if factors is not None and (
            factors.numel() != n_scales
            or factors.dtype != torch.float16
            or not factors.is_contiguous()
        ):
            raise ValueError("scales or zeros have the wrong size")
    planes = [plane.data_ptr() for plane in weight.planes] + [0] * (4 - len(widths))
    zeros = 0 if weight.zeros is None else weight.zeros.data_ptr()
    return struct.pack(
        "=8Q8i",
        *planes, weight.scales.data_ptr(), zeros, 0, bias_at,
        n_out, n_in, weight.width_bits, weight.group, 0, 1,
        weight.factor.bit_length() - 1, weight.offset,
    )  # fmt: skip
