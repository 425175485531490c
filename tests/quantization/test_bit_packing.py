"""Packed codes: literal bytes, and back again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.quantization.bit_packing import pack, packed_row_bytes, unpack


@pytest.mark.parametrize(
    ("n_inputs", "width_bits", "n_bytes"),
    [(1, 8, 1), (5, 8, 5), (1, 4, 1), (2, 4, 1), (5, 4, 3), (64, 4, 32)],
)
def test_a_row_ends_with_a_whole_byte(n_inputs: int, width_bits: int, n_bytes: int) -> None:
    assert packed_row_bytes(n_inputs, width_bits) == n_bytes


def test_eight_bit_codes_are_twos_complement() -> None:
    codes = torch.tensor([[-128, -1, 0], [1, 2, 127]], dtype=torch.int8)
    assert pack(codes, 8).tolist() == [[0x80, 0xFF, 0x00], [0x01, 0x02, 0x7F]]


def test_four_bit_codes_are_offset_by_eight_with_the_even_input_low() -> None:
    # -8 is stored as 0, -1 as 7, 0 as 8, 1 as 9, 7 as 15.
    codes = torch.tensor([[-8, 7, 0, -1], [1, -8, 7, 7]], dtype=torch.int8)
    assert pack(codes, 4).tolist() == [[0xF0, 0x78], [0x09, 0xFF]]


def test_a_row_of_odd_length_ends_in_a_high_half_of_code_zero() -> None:
    codes = torch.tensor([[-8, -8, 7], [3, 2, -8]], dtype=torch.int8)
    assert pack(codes, 4).tolist() == [[0x00, 0x8F], [0xAB, 0x80]]


def test_every_byte_of_four_bit_codes_comes_back() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).view(16, 16)
    codes = unpack(every_byte, 4, n_inputs=32)
    assert codes.min() == -8 and codes.max() == 7
    assert torch.equal(pack(codes, 4), every_byte)


@pytest.mark.parametrize("width_bits", [8, 4])
def test_packing_leaves_its_input_alone(width_bits: int) -> None:
    codes = torch.tensor([[-8, 7, 3]], dtype=torch.int8)
    pack(codes, width_bits)
    assert codes.tolist() == [[-8, 7, 3]]


@settings(deadline=None, max_examples=60)
@given(data=st.data(), width_bits=st.sampled_from([8, 4]))
def test_codes_come_back(data: st.DataObject, width_bits: int) -> None:
    n_out, n_in = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    highest = 2 ** (width_bits - 1) - 1
    code = st.integers(-highest - 1, highest)
    rows = data.draw(
        st.lists(st.lists(code, min_size=n_in, max_size=n_in), min_size=n_out, max_size=n_out)
    )
    packed = pack(torch.tensor(rows, dtype=torch.int8), width_bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (n_out, packed_row_bytes(n_in, width_bits))
    assert unpack(packed, width_bits, n_inputs=n_in).tolist() == rows


def test_codes_that_do_not_lie_in_one_piece_are_packed_as_they_read() -> None:
    codes = torch.tensor([[1, -2], [3, -4], [5, -6]], dtype=torch.int8).T
    for width_bits in (8, 4):
        packed = pack(codes, width_bits)
        assert unpack(packed, width_bits, n_inputs=3).tolist() == [[1, 3, 5], [-2, -4, -6]]
