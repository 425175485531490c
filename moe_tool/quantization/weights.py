"""Matrices of an expert as a record holds them: floats, or integer codes with scales."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from moe_tool.quantization.kept_codes import KeptWeight

PLANE, SCALES, ZEROS, BASE_SCALES = "plane", "scales", "zeros", "base_scales"
"""Names of the tensors that an integer matrix is stored in"""


@dataclass(frozen=True, slots=True, eq=False)
class FloatWeight:
    """Matrix or vector in float32, bfloat16 or float16."""

    values: torch.Tensor
    """[out, in] matrix or [out] bias"""

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents (out, in) or (out,)."""
        return tuple(self.values.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the values."""
        return self.values.nbytes

    @property
    def base(self) -> "FloatWeight":
        """The tensor itself: a nested expert's floats are those of its first bits too"""
        return self

    def part(self, name: str) -> torch.Tensor:
        """Return the tensor that a record keeps; `name` is empty, there is one alone."""
        assert not name
        return self.values


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class IntegerWeight:
    """Matrix of unsigned codes.

    weight[o, i] = (code[o, i] - zero) * scale, with scale and zero of output o and the group of
    input i; without zeros weight[o, i] = (factor * code[o, i] - offset) * scale.
    """

    planes: tuple[torch.Tensor, ...]
    """Bit planes of the codes, uint8, see bit_packing"""
    scales: torch.Tensor
    """Scales, float16 [row blocks, groups, 16]; may be negative"""
    zeros: torch.Tensor | None = None
    """Zero points in units of codes, shaped as `scales`; None: `factor` and `offset` apply"""
    base_scales: torch.Tensor | None = None
    """Scales of the nested 2-bit base, shaped as `scales`; None: not nested"""
    width_bits: int
    of_bits: int | None = None
    """Bits of the whole codes if these are only their first bits; None: the codes are whole"""
    group: int
    """Inputs that share a scale, a multiple of 32; the last group of a row may be short"""
    n_outputs: int
    n_inputs: int

    @property
    def shape(self) -> tuple[int, int]:
        """Extents (out, in)."""
        return (self.n_outputs, self.n_inputs)

    def part(self, name: str) -> torch.Tensor:
        """Return the tensor that a record keeps under a name: plane0, plane1, scales, zeros or
        base_scales."""
        if name.startswith(PLANE):
            return self.planes[int(name.removeprefix(PLANE))]
        found = {SCALES: self.scales, ZEROS: self.zeros, BASE_SCALES: self.base_scales}[name]
        assert found is not None
        return found

    @property
    def base(self) -> "IntegerWeight":
        """Nested base: the matrix of the codes' first two bits, as views."""
        assert self.base_scales is not None
        return replace(
            self,
            planes=self.planes[:1],
            scales=self.base_scales,
            base_scales=None,
            width_bits=2,
            of_bits=self.width_bits,
        )

    @property
    def factor(self) -> int:
        """Integer step between codes; doubled where midpoints are needed."""
        if self.of_bits is not None:
            return 2 << (self.of_bits - self.width_bits)
        return 2 if self.width_bits == 1 else 1

    @property
    def offset(self) -> int:
        """Integer zero point after `factor`: symmetric; one bit stands for -1 or 1, first bits for
        the middle of their codes."""
        if self.of_bits is not None:
            return (1 << self.of_bits) - (1 << (self.of_bits - self.width_bits)) + 1
        return 1 if self.width_bits == 1 else 1 << (self.width_bits - 1)


AnyWeight = FloatWeight | IntegerWeight | KeptWeight
"""Forms of a matrix that products are computed from"""


class StoredExpert(Protocol):
    """An expert as a store hands it out, in whatever memory it lies."""

    def to_host(self) -> "ExpertWeights":
        """Return the expert in memory that the host's kernels can address."""


class ExpertWeights(dict[str, AnyWeight]):
    """Tensors of an expert by name.

    They may be views of a slot that holds one expert after the other. The compute code caches in
    `prepared` what stays valid for all of these: addresses and shapes, no values.
    """

    __slots__ = ("prepared",)

    def __init__(self, tensors: Mapping[str, AnyWeight] | None = None) -> None:
        """Hold some tensors, or nothing yet."""
        super().__init__(tensors or {})
        self.prepared: Any = None

    def to_host(self) -> "ExpertWeights":
        """Return the expert itself: it is in memory that the host's kernels can address."""
        return self


def base_of(
    weights: Mapping[str, AnyWeight],
) -> dict[str, AnyWeight]:
    """Return the expert that a nested one's first bits are; views."""
    return {name: weight.base for name, weight in weights.items()}
