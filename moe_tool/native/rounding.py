"""Compiled round-to-nearest, so that packing is as fast as the disk."""

import torch

from moe_tool.native import kernels
from moe_tool.quantization.bit_packing import plane_bytes, plane_widths
from moe_tool.quantization.round_to_nearest import (
    GROUP,
    not_finite,
    quantize,
    scales_of_largest,
    tile_rows,
)
from moe_tool.quantization.weights import IntegerWeight

_N_PLANES = 4
_MAX_GROUP = 128


def round_matrix(weight: torch.Tensor, width_bits: int, *, group: int = GROUP) -> IntegerWeight:
    """Return the bit-identical result of `quantize`, which computes it if no kernel can.

    Args:
        weight: [out, in], any float dtype.
        width_bits: 1 to 8.
        group: inputs per scale, a multiple of 32.

    Raises:
        CorruptArtifactError: the matrix holds NaN or infinity.
    """
    kind = kernels.FLOAT_KINDS.get(weight.dtype)
    if not kernels.is_native() or kind is None or width_bits == 1 or group > _MAX_GROUP:
        return quantize(weight, width_bits, group=group)
    weight = weight.contiguous()
    n_out, n_in = weight.shape
    largest = torch.empty(n_out, -(-n_in // group))
    kernels.compiled().largest_of_groups(
        weight.data_ptr(), kind, n_out, n_in, group, largest.data_ptr()
    )
    if not torch.isfinite(largest).all():
        raise not_finite()
    scales = scales_of_largest(largest, width_bits)
    wide = scales.float()
    planes = tuple(
        torch.empty(plane_bytes(n_out, n_in, bits), dtype=torch.uint8)
        for bits in plane_widths(width_bits)
    )
    to = [plane.data_ptr() for plane in planes] + [0] * (_N_PLANES - len(planes))
    kernels.compiled().round_to_nearest(
        weight.data_ptr(), kind, n_out, n_in, width_bits, group, wide.data_ptr(), *to
    )
    return IntegerWeight(
        planes=planes,
        scales=tile_rows(scales),
        width_bits=width_bits,
        group=group,
        n_outputs=n_out,
        n_inputs=n_in,
    )
