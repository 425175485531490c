"""Unsigned codes of 1 to 8 bits in tiles of 16 outputs and 32 inputs, as the kernels read them.

The 16 outputs of a tile are the 16 lanes of a register, so no sum runs across lanes. The bits of a
code lie in planes, the two most significant first, so that a prefix of planes is the same matrix at
fewer bits: 1 -> [1], 2 -> [2], 3 -> [2, 1], 4 -> [2, 2], ... 7 -> [2, 2, 2, 1]; 8 bits are one
plane. A plane is [row blocks, input blocks, bytes of a tile]:

- two bits, 128 bytes: byte 64 h + 4 r + i, bits 2k and 2k + 1: output r, input 16 h + 4 k + i
- one bit, 64 bytes: byte 4 r + i, bit k: output r, input 4 k + i
- eight bits, 512 bytes: byte 64 k + 4 r + i: output r, input 4 k + i

Padding of the last tiles has code 0.
"""

from collections.abc import Sequence

import torch

ROWS = 16
"""Outputs per tile"""
INPUTS = 32
"""Inputs per tile"""


def plane_widths(width_bits: int) -> tuple[int, ...]:
    """Return the bits of each plane, most significant first."""
    if width_bits == 8:
        return (8,)
    return (2,) * (width_bits // 2) + (1,) * (width_bits % 2)


def n_row_blocks(n_outputs: int) -> int:
    """Return the number of tiles along the outputs."""
    return -(-n_outputs // ROWS)


def plane_bytes(n_outputs: int, n_inputs: int, plane_bits: int) -> int:
    """Return the bytes of one plane."""
    return n_row_blocks(n_outputs) * -(-n_inputs // INPUTS) * ROWS * INPUTS * plane_bits // 8


def pack(codes: torch.Tensor, width_bits: int) -> tuple[torch.Tensor, ...]:
    """Return the bit planes of codes.

    Args:
        codes: uint8 [out, in], below 2**width_bits.
        width_bits: 1 to 8.

    Returns:
        uint8 [plane_bytes] for each of `plane_widths(width_bits)`.
    """
    n_out, n_in = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -n_in % INPUTS, 0, -n_out % ROWS))
    tiles = padded.view(padded.shape[0] // ROWS, ROWS, padded.shape[1] // INPUTS, INPUTS)
    tiles = tiles.transpose(1, 2)  # [NB, KB, 16, 32]
    planes = []
    left = width_bits
    for bits in plane_widths(width_bits):
        left -= bits
        part = (tiles >> left) & (2**bits - 1) if bits < 8 else tiles
        planes.append(_pack_plane(part, bits))
    return tuple(planes)


def unpack(
    planes: Sequence[torch.Tensor], width_bits: int, *, n_outputs: int, n_inputs: int
) -> torch.Tensor:
    """Return the codes given to `pack`, uint8 [n_outputs, n_inputs]."""
    blocks = (n_row_blocks(n_outputs), -(-n_inputs // INPUTS))
    codes: torch.Tensor | None = None
    for plane, bits in zip(planes, plane_widths(width_bits), strict=True):
        part = _unpack_plane(plane.view(*blocks, ROWS * INPUTS * bits // 8), bits)
        codes = part if codes is None else (codes << bits) | part
    assert codes is not None
    rows = codes.transpose(1, 2).reshape(blocks[0] * ROWS, blocks[1] * INPUTS)
    return rows[:n_outputs, :n_inputs]


def _pack_plane(tiles: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack [NB, KB, 16, 32] of codes below 2**bits."""
    per_byte = 8 // bits  # k of the layout
    n_rows, n_inputs = tiles.shape[:2]
    # An input is 4 per_byte h + 4 k + i.
    parts = tiles.reshape(n_rows, n_inputs, ROWS, -1, per_byte, 4)  # [..., r, h, k, i]
    packed = torch.zeros_like(parts[..., 0, :])
    for k in range(per_byte):
        packed |= parts[..., k, :] << (bits * k)
    return packed.transpose(2, 3).reshape(-1)  # [NB, KB, h, r, i]


def _unpack_plane(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Return [NB, KB, 16, 32] from [NB, KB, bytes of a tile]."""
    n_rows, n_inputs = packed.shape[:2]
    per_byte = 8 // bits
    parts = packed.view(n_rows, n_inputs, -1, ROWS, 4)  # [NB, KB, h, r, i]
    if bits == 8:
        codes = parts[..., None, :]
    else:
        mask = 2**bits - 1
        codes = torch.stack([(parts >> (bits * k)) & mask for k in range(per_byte)], dim=-2)
    # [NB, KB, h, r, k, i] -> [NB, KB, r, h, k, i]
    return codes.transpose(2, 3).reshape(n_rows, n_inputs, ROWS, INPUTS)
