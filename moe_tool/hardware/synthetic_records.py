"""Synthetic expert records in one block of memory, too many for a cache to keep any of them."""

import torch

from moe_tool.artifacts.form_table import ALIGNMENT_BYTES
from moe_tool.artifacts.hardware_profile import Bits
from moe_tool.quantization.bit_packing import ROWS, n_row_blocks, plane_bytes, plane_widths
from moe_tool.quantization.round_to_nearest import GROUP
from moe_tool.quantization.weights import ExpertWeights, FloatWeight, IntegerWeight
from moe_tool.store.slots import SlotPool

_PATTERN_NUMBERS = 2**21
_LOWEST, _BEYOND = 0x3B80, 0x3E00
"""Range of 16-bit patterns: 0.004 to 0.12 in bfloat16 and 0.9 to 1.5 in float16, so that any part
of the block can be weights, codes or scales without NaN, infinity or denormals"""


def make_block(size_bytes: int) -> torch.Tensor:
    """Return memory to cut records from, uint8 [at least size_bytes], on huge pages."""
    draw = torch.Generator().manual_seed(0)
    pattern = torch.randint(
        _LOWEST, _BEYOND, (_PATTERN_NUMBERS,), dtype=torch.int16, generator=draw
    )
    n_repeats = -(-size_bytes // (2 * _PATTERN_NUMBERS))
    block = SlotPool(n_slots=1, slot_size_bytes=2 * _PATTERN_NUMBERS * n_repeats).view(0)
    block.view(torch.int16).view(n_repeats, -1).copy_(pattern)
    return block


def matrix_bytes(bits: Bits, n_outputs: int, n_inputs: int) -> int:
    """Return the bytes of a matrix in a record, every part padded."""
    return sum(_padded(size) for size in _part_bytes(bits, n_outputs, n_inputs))


def cut_matrix(
    block: torch.Tensor, bits: Bits, n_outputs: int, n_inputs: int
) -> FloatWeight | IntegerWeight:
    """Return a matrix of views of the start of the block."""
    parts, offset = [], 0
    for size in _part_bytes(bits, n_outputs, n_inputs):
        parts.append(block[offset : offset + size])
        offset += _padded(size)
    if bits == "native":
        return FloatWeight(parts[0].view(torch.bfloat16).view(n_outputs, n_inputs))
    *planes, scales = parts
    return IntegerWeight(
        planes=tuple(planes),
        scales=scales.view(torch.float16).view(n_row_blocks(n_outputs), -1, ROWS),
        width_bits=int(bits),
        group=GROUP,
        n_outputs=n_outputs,
        n_inputs=n_inputs,
    )


def record_bytes(bits: Bits, hidden: int, inner: int) -> int:
    """Return the bytes of one expert's record: gate and up [2I, H], down [H, I]."""
    return matrix_bytes(bits, 2 * inner, hidden) + matrix_bytes(bits, hidden, inner)


def cut_records(block: torch.Tensor, bits: Bits, hidden: int, inner: int) -> list[ExpertWeights]:
    """Return as many consecutive experts as the block has room for.

    Raises:
        ValueError: the block has no room for two.
    """
    size = record_bytes(bits, hidden, inner)
    n_records = len(block) // size
    if n_records < 2:
        raise ValueError(f"a block of {len(block)} bytes for records of {size}")
    first = matrix_bytes(bits, 2 * inner, hidden)
    records = []
    for start in range(0, n_records * size, size):
        weights = ExpertWeights()
        weights["gate_up_proj"] = cut_matrix(block[start:], bits, 2 * inner, hidden)
        weights["down_proj"] = cut_matrix(block[start + first :], bits, hidden, inner)
        records.append(weights)
    return records


def _part_bytes(bits: Bits, n_outputs: int, n_inputs: int) -> list[int]:
    if bits == "native":
        return [n_outputs * n_inputs * 2]
    planes = [plane_bytes(n_outputs, n_inputs, width) for width in plane_widths(int(bits))]
    return [*planes, n_row_blocks(n_outputs) * -(-n_inputs // GROUP) * ROWS * 2]


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
