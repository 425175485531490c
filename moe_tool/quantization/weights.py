"""An expert's matrices as a record holds them: floats, or integer codes with scales."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class FloatWeight:
    """A matrix or a vector in float32, bfloat16 or float16."""

    values: torch.Tensor
    """[out, in] or [out]"""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class IntegerWeight:
    """A matrix of signed codes; weight[o, i] = code[o, i] * scales[o, i // group]."""

    codes: torch.Tensor
    """uint8 [out, ceil(in * width_bits / 8)], see bit_packing"""
    scales: torch.Tensor
    """float16 [out, ceil(in / group)]; may be negative"""
    width_bits: int
    group: int
    """Inputs that share a scale; the last group of a row may be short"""
    n_inputs: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return (self.codes.shape[0], self.n_inputs)
