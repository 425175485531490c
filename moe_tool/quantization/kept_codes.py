"""Matrix whose codes are kept as a quantized checkpoint stores them, and its definition in torch.

A number in float32, every operation rounded on its own, in this order:

    s = float32(scale), then s * global_scale, or s / global_scale where the scale is divided by it
    without zeros, or with codes as zeros:  (number - zero) * s
    with float zeros (a bias):              number * s + zero

`number` is table[code] of e2m1 and nf4, the float of e4m3, the unsigned code of int4 and int8; the
zero of integers without zeros is half their range, 8 or 128. The compiled kernels make the same
numbers to the last bit.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

CodeKind = Literal["e2m1", "e4m3", "int4", "int8", "nf4"]
CODE_BITS: dict[CodeKind, int] = {"e2m1": 4, "int4": 4, "nf4": 4, "e4m3": 8, "int8": 8}
MIDDLES: dict[CodeKind, int] = {"int4": 8, "int8": 128}
"""Zeros of integers that have none of their own"""
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TABLES: dict[CodeKind, tuple[float, ...]] = {
    "e2m1": _E2M1 + tuple(-value for value in _E2M1),
    "int4": tuple(float(code) for code in range(16)),
    # bitsandbytes' quantiles of a normal distribution
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
}  # fmt: skip
"""Numbers of the sixteen codes of 4 bits"""
SCALE_KINDS = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.uint8: "e8m0",
    torch.float8_e4m3fn: "e4m3",
}
"""Names of the dtypes that scales may have; uint8 holds exponents, 2**(byte - 127)"""
_MOST_SCALE = 2.0**119
"""Scales of e4m3 whose product with the largest code is finite, in the kernels' steps too"""
_SAFE_SCALE = 2.0**118
"""Limit below which a scale times any code's number, 448 at most, plus a bias up to `_SAFE_BIAS` is
finite"""
_SAFE_BIAS = 2.0**126
_BLOCK = 2**18
"""Weights decoded at a time, which stay in the second-level cache"""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class KeptWeight:
    """Matrix [out, in] of codes with scales for groups of rows and columns."""

    codes: torch.Tensor
    """Codes, uint8 [out, in * bits / 8]; of 4 bits the even input in the low half of a byte"""
    kind: CodeKind
    scale: torch.Tensor
    """Scales [row groups, column groups], in a dtype of `SCALE_KINDS`"""
    group: tuple[int, int]
    """Rows and columns that share a scale; the last groups may be short"""
    global_scale: torch.Tensor | None = None
    """Scale of each output beside those of groups, float32 [out]"""
    is_divisor: bool = False
    """Whether scales are divided by `global_scale` instead of multiplied"""
    zero: torch.Tensor | None = None
    """Zeros, shaped as `scale`: uint8 in units of codes, or float32, a bias that is added"""

    def __post_init__(self) -> None:
        """Refuse parts that do not fit together.

        Raises:
            ValueError: names the part.
        """
        if self.codes.dtype != torch.uint8 or self.codes.ndim != 2 or min(self.group) < 1:
            raise ValueError("codes are no bytes [out, in], or a group is empty")
        if self.scale.dtype not in SCALE_KINDS or tuple(self.scale.shape) != self.grid:
            raise ValueError(
                f"scales {tuple(self.scale.shape)} of {self.shape} are not {self.grid}"
            )
        if self.global_scale is not None and (
            self.global_scale.dtype != torch.float32
            or tuple(self.global_scale.shape) != self.shape[:1]
        ):
            raise ValueError("global scales are not one float32 an output")
        if self.zero is not None and (
            self.zero.dtype not in (torch.uint8, torch.float32)
            or tuple(self.zero.shape) != self.grid
            or self.kind not in MIDDLES
        ):
            raise ValueError("zeros are not those of integer codes, one a scale")

    @property
    def shape(self) -> tuple[int, int]:
        """Extents (out, in)."""
        return (self.codes.shape[0], self.codes.shape[1] * 8 // CODE_BITS[self.kind])

    @property
    def grid(self) -> tuple[int, int]:
        """Groups of rows and of columns."""
        (n_out, n_in), (rows, columns) = self.shape, self.group
        return (-(-n_out // rows), -(-n_in // columns))

    @property
    def size_bytes(self) -> int:
        """Bytes of all parts."""
        parts = (self.codes, self.scale, self.global_scale, self.zero)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def base(self) -> "KeptWeight":
        """The matrix itself: kept codes are not nested"""
        return self

    def part(self, name: str) -> torch.Tensor:
        """Return the tensor that a record keeps: codes, scale, global_scale or zero."""
        found: torch.Tensor = getattr(self, name)
        return found

    def decode(self, first: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows [first, stop) in float32 as this file defines them, [rows, in]."""
        n_out, n_in = self.shape
        row = torch.arange(first, n_out if stop is None else stop, device=self.codes.device)
        numbers = _numbers(self.codes[first:stop], self.kind)
        group = row // self.group[0]
        scale = _floats(self.scale)[group]  # [rows, column groups]
        if self.global_scale is not None:
            factor = self.global_scale[row, None]
            scale = scale / factor if self.is_divisor else scale * factor
        scale = self._spread(scale, n_in)
        if self.zero is None:
            return (numbers - MIDDLES.get(self.kind, 0)).mul_(scale)
        zero = self._spread(self.zero[group].to(torch.float32), n_in)
        if self.zero.dtype == torch.uint8:
            return (numbers - zero).mul_(scale)
        return numbers.mul_(scale).add_(zero)

    def _spread(self, values: torch.Tensor, n_inputs: int) -> torch.Tensor:
        columns = min(self.group[1], n_inputs)  # a group may be far longer than a row
        return values.repeat_interleave(columns, dim=1)[:, :n_inputs]

    def with_rows_alone(self) -> "KeptWeight":
        """Return the same matrix with a scale for every row: nothing but scales is repeated."""
        if self.group[0] == 1:
            return self
        row = torch.arange(self.shape[0], device=self.codes.device) // self.group[0]
        return replace(
            self,
            scale=self.scale[row],
            zero=None if self.zero is None else self.zero[row],
            group=(1, self.group[1]),
        )

    def rows(self, order: torch.Tensor) -> "KeptWeight":
        """Return rows of the matrix in this order, int64 [rows], each with scales of its own."""
        alone = self.with_rows_alone()
        factors = self.global_scale
        return replace(
            alone,
            codes=alone.codes[order],
            scale=alone.scale[order],
            global_scale=None if factors is None else factors[order],
            zero=None if alone.zero is None else alone.zero[order],
        )

    def broken_part(self) -> str | None:
        """Return the name of a part that stands for NaN or infinity; None: all are numbers."""
        for name in ("codes", "scale", "global_scale", "zero"):
            if self.part(name) is not None and not self._are_numbers(name):
                return name
        return "scale" if self._may_overflow() and not self._is_finite() else None

    def _are_numbers(self, name: str) -> bool:
        part = self.part(name)
        if (name == "codes" and self.kind == "e4m3") or part.dtype == torch.float8_e4m3fn:
            return not bool(((part.view(torch.uint8) & 127) == 127).any())
        if name == "scale" and self.kind == "e4m3":
            return bool((_floats(part).abs() < _MOST_SCALE).all())
        if part.dtype == torch.uint8:
            return name != "scale" or not bool((part == 255).any())
        return bool(torch.isfinite(part).all())

    def _may_overflow(self) -> bool:
        """Tell by the largest parts, without decoding, whether a number may leave float32."""
        # Exponents are compared as bytes: the largest byte is the largest scale.
        largest = self.scale.max()[None] if self.scale.dtype == torch.uint8 else self.scale
        scale = float(_floats(largest).abs().max())
        if self.global_scale is not None and self.is_divisor:
            scale /= max(float(self.global_scale.abs().min()), sys.float_info.min)
        elif self.global_scale is not None:
            scale *= float(self.global_scale.abs().max())
        bias = 0.0
        if self.zero is not None and self.zero.dtype == torch.float32:
            bias = float(self.zero.abs().max())
        return scale >= _SAFE_SCALE or bias > _SAFE_BIAS

    def _is_finite(self) -> bool:
        """Return whether every number is finite, decoding a block of rows at a time."""
        rows = max(1, _BLOCK // self.shape[1])
        return all(
            bool(torch.isfinite(self.decode(first, min(first + rows, self.shape[0]))).all())
            for first in range(0, self.shape[0], rows)
        )


def kept_product(
    x: torch.Tensor,
    weight: KeptWeight,
    *,
    decode: Callable[[KeptWeight, int, int], torch.Tensor] = KeptWeight.decode,
) -> torch.Tensor:
    """Return x @ weight.T in float32, [n, out], decoding a block of rows at a time.

    Args:
        x: [n, in] float32.
        weight: the matrix.
        decode: returns rows [first, stop) of a matrix.
    """
    n_outputs, n_inputs = weight.shape
    out = x.new_empty(x.shape[0], n_outputs)
    rows = max(1, _BLOCK // n_inputs)
    for start in range(0, n_outputs, rows):
        stop = min(n_outputs, start + rows)
        torch.mm(x, decode(weight, start, stop).T, out=out[:, start:stop])
    return out


def join_rows(parts: Sequence[KeptWeight]) -> KeptWeight:
    """Return matrices below each other as one, as gate and up become gate_up.

    Scales of several rows are repeated for each where a part ends inside a group.

    Raises:
        ValueError: the parts differ in more than their rows.
    """
    first, *others = parts
    if not others:
        return first
    rows = first.group[0]
    if any(each.group[0] != rows for each in others) or any(
        each.shape[0] % rows for each in parts[:-1]
    ):
        return join_rows([each.with_rows_alone() for each in parts])
    for each in others:
        if _form_of(each) != _form_of(first):
            raise ValueError("matrices of different formats cannot be joined")
    names = ("codes", "scale", "global_scale", "zero")
    return replace(first, **{name: _joined([each.part(name) for each in parts]) for name in names})


def _form_of(weight: KeptWeight) -> tuple[object, ...]:
    zero = None if weight.zero is None else weight.zero.dtype
    has_global = weight.global_scale is not None
    columns = min(weight.group[1], weight.shape[1])
    return (
        weight.kind, weight.scale.dtype, weight.group[0], columns, weight.shape[1],
        has_global, weight.is_divisor, zero,
    )  # fmt: skip


def _joined(parts: Sequence[torch.Tensor | None]) -> Any:
    found = [part for part in parts if part is not None]
    if not found:
        return None
    if found[0].dtype == torch.float8_e4m3fn:  # torch joins no floats of 8 bits
        return torch.cat([part.view(torch.uint8) for part in found]).view(torch.float8_e4m3fn)
    return torch.cat(found)


def _numbers(codes: torch.Tensor, kind: CodeKind) -> torch.Tensor:
    """Return float32 [rows, in] of codes [rows, bytes]."""
    if kind == "e4m3":
        return codes.view(torch.float8_e4m3fn).to(torch.float32)
    if kind == "int8":
        return codes.to(torch.float32)
    table = torch.tensor(TABLES[kind], device=codes.device)
    pairs = torch.stack((codes & 15, codes >> 4), dim=-1).view(codes.shape[0], -1)
    return table[pairs.to(torch.int32)]


def _floats(scale: torch.Tensor) -> torch.Tensor:
    """Return scales in float32, exactly."""
    if scale.dtype != torch.uint8:
        return scale.to(torch.float32)
    bits = scale.to(torch.int32) << 23
    bits[scale == 0] = 1 << 22  # 2**-127 has no exponent of its own
    bits[scale == 255] = 0x7FC00000
    return bits.view(torch.float32)
