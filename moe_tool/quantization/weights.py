"""An expert's matrices as a record holds them: floats, or integer codes with scales."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True, eq=False)
class FloatWeight:
    """A matrix or a vector in float32, bfloat16 or float16."""

    values: torch.Tensor
    """[out, in] or [out]"""

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) or (out,)"""
        return tuple(self.values.shape)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class IntegerWeight:
    """A matrix of unsigned codes.

    weight[o, i] = (code[o, i] - zero) * scale, with scale and zero of output o and of the group of
    input i. Without zeros the zero is 2**(width_bits - 1); at one bit the weight is -scale or
    scale.
    """

    planes: tuple[torch.Tensor, ...]
    """uint8, see bit_packing"""
    scales: torch.Tensor
    """float16 [row blocks, groups, 16]; may be negative"""
    zeros: torch.Tensor | None = None
    """float16 as `scales`, in units of codes; None: symmetric"""
    width_bits: int
    group: int
    """Inputs that share a scale, a multiple of 32; the last group of a row may be short"""
    n_outputs: int
    n_inputs: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return (self.n_outputs, self.n_inputs)


class ExpertWeights(dict[str, FloatWeight | IntegerWeight]):
    """An expert's tensors by name.

    Where they are views of memory that is filled with one expert after the other, whoever computes
    with them keeps in `prepared` what holds for all of these: addresses and shapes, no values.
    """

    __slots__ = ("prepared",)

    def __init__(self) -> None:
        """Hold nothing yet."""
        super().__init__()
        self.prepared: Any = None
