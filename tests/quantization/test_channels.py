"""Chunks of channels: what they hold, alone and together."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.quantization.channels import (
    GRID,
    ChannelWeight,
    Selector,
    dequantize_channels,
    pack_channels,
    row_bytes,
)
from moe_tool.quantization.round_to_nearest import dequantize, from_codes, quantize


def random_channels(
    n_channels: int, n_hidden: int, bits: int = 4, group: int = 64, seed: int = 0
) -> ChannelWeight:
    draw = torch.Generator().manual_seed(seed)
    row, column = (
        quantize(torch.randn(n_channels, n_hidden, generator=draw), bits, group=group)
        for _ in range(2)
    )
    return pack_channels(row, column)


@settings(max_examples=30, deadline=None)
@given(
    n_channels=st.integers(1, 40),
    n_hidden=st.integers(1, 200),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 999),
)
def test_chunks_hold_rows_and_columns_and_each_does_alone(
    n_channels: int, n_hidden: int, bits: int, group: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    row, column = (
        quantize(torch.randn(n_channels, n_hidden, generator=draw), bits, group=group)
        for _ in range(2)
    )
    weight = pack_channels(row, column)
    rows, columns = dequantize_channels(weight)
    assert torch.equal(rows, dequantize(row)) and torch.equal(columns, dequantize(column))
    one = int(torch.randint(n_channels, (1,), generator=draw))
    alone = dequantize_channels(weight.take(torch.tensor([one])))
    assert torch.equal(alone[0][0], rows[one]) and torch.equal(alone[1][0], columns[one])


def test_a_chunk_is_codes_and_scales_of_row_then_column() -> None:
    codes = torch.zeros(1, 64)
    codes[0, 0], codes[0, 16], codes[0, 33] = -8, 7, 1  # of a row; stored plus 8
    row = from_codes(codes.clone(), torch.tensor([[2.0]]).half(), 4, group=64)
    column = from_codes(torch.zeros(1, 64), torch.tensor([[0.5]]).half(), 4, group=64)
    (chunk,) = pack_channels(row, column).chunks.tolist()
    assert len(chunk) == 2 * row_bytes(64, 4, 64) == 68
    assert chunk[:32] == [0xF0] + [0x88] * 15 + [0x88, 0x89] + [0x88] * 14
    assert chunk[32:34] == [0x00, 0x40]  # float16 2.0
    assert chunk[34:66] == [0x88] * 32 and chunk[66:] == [0x00, 0x38]


@pytest.mark.parametrize(
    ("sparsity", "threshold"), [(0, 0.0), (0.5, 10.0), (0.525, 10.5), (0.95, 19.0)]
)
def test_thresholds_are_interpolated(sparsity: float, threshold: float) -> None:
    weight = quantize(torch.ones(1, 32), 2)
    selector = Selector(
        weight=weight,
        is_gate=True,
        thresholds=np.arange(len(GRID), dtype=np.float32),
        hashes=np.zeros(1, dtype=np.uint64),
        biases={},
    )
    assert selector.threshold(sparsity) == pytest.approx(threshold)
