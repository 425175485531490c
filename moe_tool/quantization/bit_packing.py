"""Signed integer codes packed into bytes, row by row.

8 bits: one two's-complement code per byte. 4 bits: codes plus 8, the code of the even input in the
low nibble; a row of an odd number of inputs ends in a byte whose high nibble is 8 (code 0).
"""

import torch


def packed_row_bytes(n_inputs: int, width_bits: int) -> int:
    """Return the bytes of one row."""
    return -(-n_inputs * width_bits // 8)


def pack(codes: torch.Tensor, width_bits: int) -> torch.Tensor:
    """Return the packed codes.

    Args:
        codes: int8 [out, in], in -2**(width_bits - 1) ... 2**(width_bits - 1) - 1.
        width_bits: 8 or 4.

    Returns:
        uint8 [out, ceil(in * width_bits / 8)].
    """
    if width_bits == 8:
        return codes.contiguous().view(torch.uint8)
    assert width_bits == 4
    n_out, n_in = codes.shape
    nibbles = (codes + 8).view(torch.uint8)
    if n_in % 2:
        nibbles = torch.cat([nibbles, nibbles.new_full((n_out, 1), 8)], dim=1)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack(packed: torch.Tensor, width_bits: int, *, n_inputs: int) -> torch.Tensor:
    """Return int8 [out, n_inputs]: what `pack` was given."""
    if width_bits == 8:
        return packed.view(torch.int8)
    assert width_bits == 4
    low = (packed & 0xF).view(torch.int8) - 8
    high = (packed >> 4).view(torch.int8) - 8
    return torch.stack([low, high], dim=-1).flatten(1)[:, :n_inputs]
