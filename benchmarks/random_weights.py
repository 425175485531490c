"""Random weights in so many copies that no cache keeps one until its next turn."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from moe_tool.quantization.bit_packing import ROWS, n_row_blocks, plane_bytes, plane_widths
from moe_tool.quantization.round_to_nearest import GROUP
from moe_tool.quantization.weights import FloatWeight, IntegerWeight

_CACHES_TO_FILL = 4
Item = TypeVar("Item")


@dataclass(slots=True)
class Rotation(Generic[Item]):
    """Equal things, taken in turn."""

    size_bytes: int
    """Of one"""
    _turns: Iterator[Item]

    def next(self) -> Item:
        """Return the one that was used longest ago."""
        return next(self._turns)


def rotate(make: Callable[[int], Item], *, size_bytes: int, cache_bytes: int) -> Rotation[Item]:
    """Return copies that together fill the last-level cache four times, at least two.

    Args:
        make: called with a seed.
        size_bytes: of one copy.
        cache_bytes: of the last-level cache.
    """
    n_copies = max(2, -(-_CACHES_TO_FILL * cache_bytes // size_bytes))
    return Rotation(size_bytes, itertools.cycle([make(seed) for seed in range(n_copies)]))


def integer_weight(n_out: int, n_in: int, width_bits: int, *, seed: int) -> IntegerWeight:
    """Return random codes with small scales, as a bundle's records hold them."""
    draw = torch.Generator().manual_seed(seed)
    planes = tuple(
        torch.randint(0, 256, (plane_bytes(n_out, n_in, bits),), dtype=torch.uint8, generator=draw)
        for bits in plane_widths(width_bits)
    )
    scales = torch.rand(n_row_blocks(n_out), -(-n_in // GROUP), ROWS, generator=draw)
    return IntegerWeight(
        planes=planes,
        scales=scales.mul_(n_in**-0.5 / 2**width_bits).half(),
        width_bits=width_bits,
        group=GROUP,
        n_outputs=n_out,
        n_inputs=n_in,
    )


def integer_bytes(n_out: int, n_in: int, width_bits: int) -> int:
    """Return what one product reads of such a weight: codes with their scales."""
    codes = sum(plane_bytes(n_out, n_in, bits) for bits in plane_widths(width_bits))
    return codes + n_row_blocks(n_out) * -(-n_in // GROUP) * ROWS * 2


def float_weight(n_out: int, n_in: int, dtype: torch.dtype, *, seed: int) -> FloatWeight:
    """Return random floats."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.rand(n_out, n_in, generator=draw).sub_(0.5).mul_(n_in**-0.5)
    return FloatWeight(values.to(dtype))


@dataclass(frozen=True, slots=True)
class TorchInt4:
    """A 4-bit weight as torch's own product takes it, with groups of the same size as ours."""

    packed: torch.Tensor
    scales_and_zeros: torch.Tensor

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ weight.T; x has to be bfloat16, with float32 torch takes a slow path."""
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self.packed, GROUP, self.scales_and_zeros
        )


def torch_int4(n_out: int, n_in: int, *, seed: int) -> TorchInt4:
    """Return random codes in torch's layout."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n_out, n_in), dtype=torch.int32, generator=draw)
    factors = torch.rand(n_in // GROUP, n_out, 2, generator=draw).mul_(n_in**-0.5 / 16)
    return TorchInt4(
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), factors.bfloat16()
    )
