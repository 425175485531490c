"""An expert's matrices as a record holds them: floats, or integer codes with scales."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

PLANE, SCALES, ZEROS, BASE_SCALES = "plane", "scales", "zeros", "base_scales"
"""Names of the tensors that an integer matrix is stored in"""


@dataclass(frozen=True, slots=True, eq=False)
class FloatWeight:
    """A matrix or a vector in float32, bfloat16 or float16."""

    values: torch.Tensor
    """[out, in] or [out]"""

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) or (out,)"""
        return tuple(self.values.shape)

    def part(self, name: str) -> torch.Tensor:
        """Return the tensor that a record keeps; `name` is empty, there is one alone."""
        assert not name
        return self.values


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class IntegerWeight:
    """A matrix of unsigned codes.

    weight[o, i] = (code[o, i] - zero) * scale, with scale and zero of output o and of the group of
    input i. Without zeros weight[o, i] = (factor * code[o, i] - offset) * scale.
    """

    planes: tuple[torch.Tensor, ...]
    """uint8, see bit_packing"""
    scales: torch.Tensor
    """float16 [row blocks, groups, 16]; may be negative"""
    zeros: torch.Tensor | None = None
    """float16 as `scales`, in units of codes; None: the same everywhere, see `factor`"""
    base_scales: torch.Tensor | None = None
    """float16 as `scales`: of the matrix that the codes' first bits are; None: they are none"""
    width_bits: int
    of_bits: int | None = None
    """These are the first bits of codes of so many; None: the codes are whole"""
    group: int
    """Inputs that share a scale, a multiple of 32; the last group of a row may be short"""
    n_outputs: int
    n_inputs: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
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
        """The matrix that the codes' first bits are; views."""
        assert self.base_scales is not None
        return IntegerWeight(
            planes=self.planes[:1],
            scales=self.base_scales,
            width_bits=2,
            of_bits=self.width_bits,
            group=self.group,
            n_outputs=self.n_outputs,
            n_inputs=self.n_inputs,
        )

    @property
    def factor(self) -> int:
        """Of a code, in whole numbers: twice its distance from the next where half is needed."""
        if self.of_bits is not None:
            return 2 << (self.of_bits - self.width_bits)
        return 2 if self.width_bits == 1 else 1

    @property
    def offset(self) -> int:
        """What is taken off that: symmetric, one bit is -1 or 1; of first bits, the middle of the
        codes that begin with them."""
        if self.of_bits is not None:
            return (1 << self.of_bits) - (1 << (self.of_bits - self.width_bits)) + 1
        return 1 if self.width_bits == 1 else 1 << (self.width_bits - 1)


class StoredExpert(Protocol):
    """An expert as a store hands it out, in whatever memory it lies."""

    def to_host(self) -> "ExpertWeights":
        """Return the expert in memory that the host's kernels can address."""


class ExpertWeights(dict[str, FloatWeight | IntegerWeight]):
    """An expert's tensors by name.

    Where they are views of memory that is filled with one expert after the other, whoever computes
    with them keeps in `prepared` what holds for all of these: addresses and shapes, no values.
    """

    __slots__ = ("prepared",)

    def __init__(self, tensors: Mapping[str, FloatWeight | IntegerWeight] | None = None) -> None:
        """Hold some tensors, or nothing yet."""
        super().__init__(tensors or {})
        self.prepared: Any = None

    def to_host(self) -> "ExpertWeights":
        """Return the expert itself: it is in memory that the host's kernels can address."""
        return self


def base_of(
    weights: Mapping[str, FloatWeight | IntegerWeight],
) -> dict[str, FloatWeight | IntegerWeight]:
    """Return the expert that a nested one's first bits are; views."""
    return {
        name: weight.base if isinstance(weight, IntegerWeight) else weight
        for name, weight in weights.items()
    }
