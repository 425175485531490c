"""Packed codes: literal bytes, and back again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.quantization.bit_packing import pack, plane_bytes, plane_widths, unpack


@pytest.mark.parametrize(
    ("width_bits", "widths"),
    [(1, (1,)), (2, (2,)), (3, (2, 1)), (4, (2, 2)), (7, (2, 2, 2, 1)), (8, (8,))],
)
def test_planes_are_two_bits_wide_and_the_last_takes_the_rest(
    width_bits: int, widths: tuple[int, ...]
) -> None:
    assert plane_widths(width_bits) == widths


def test_planes_consist_of_whole_tiles() -> None:
    # 17 x 33 takes two by two tiles of 16 x 32 codes.
    assert [plane_bytes(17, 33, bits) for bits in (1, 2, 8)] == [256, 512, 2048]
    assert plane_bytes(16, 32, 2) == 128


def one_code(n_out: int, n_in: int, place: tuple[int, int], code: int) -> torch.Tensor:
    codes = torch.zeros(n_out, n_in, dtype=torch.uint8)
    codes[place] = code
    return codes


@pytest.mark.parametrize(
    ("width_bits", "place", "code", "expected"),
    [
        # byte 64 h + 4 r + i, bits 2k: input 16 h + 4 k + i; here h = 1, k = 2, i = 3, r = 5
        (2, (5, 27), 3, [{64 + 20 + 3: 0b110000}]),
        # the two high bits first, then the low ones
        (4, (5, 27), 0b1101, [{64 + 20 + 3: 0b110000}, {64 + 20 + 3: 0b010000}]),
        (3, (5, 27), 0b101, [{64 + 20 + 3: 0b100000}, {20 + 3: 1 << 6}]),
        # byte 4 r + i, bit k: input 4 k + i
        (1, (5, 27), 1, [{20 + 3: 1 << 6}]),
        # byte 64 k + 4 r + i
        (8, (5, 27), 200, [{64 * 6 + 20 + 3: 200}]),
        # the second block of outputs, the second block of inputs: the fourth tile
        (2, (16, 32), 1, [{3 * 128: 1}]),
    ],
)
def test_where_a_code_lies(
    width_bits: int, place: tuple[int, int], code: int, expected: list[dict[int, int]]
) -> None:
    planes = pack(one_code(17, 33, place, code), width_bits)
    found = [{int(at): int(plane[at]) for at in plane.nonzero().flatten()} for plane in planes]
    assert found == expected


@settings(deadline=None, max_examples=60)
@given(
    n_out=st.integers(1, 40),
    n_in=st.integers(1, 70),
    width_bits=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_codes_come_back(n_out: int, n_in: int, width_bits: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**width_bits, (n_out, n_in), generator=draw, dtype=torch.uint8)
    kept = codes.clone()
    planes = pack(codes, width_bits)
    assert torch.equal(codes, kept)
    assert [plane.dtype for plane in planes] == [torch.uint8] * len(planes)
    assert [plane.numel() for plane in planes] == [
        plane_bytes(n_out, n_in, bits) for bits in plane_widths(width_bits)
    ]
    assert torch.equal(unpack(planes, width_bits, n_outputs=n_out, n_inputs=n_in), codes)


def test_the_first_plane_is_the_same_matrix_at_two_bits() -> None:
    codes = torch.randint(0, 16, (20, 40), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, 4)[:1], 2, n_outputs=20, n_inputs=40), codes >> 2)


def test_codes_that_do_not_lie_in_one_piece_are_packed_as_they_read() -> None:
    codes = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.uint8).T
    for width_bits in (8, 4, 3):
        planes = pack(codes, width_bits)
        found = unpack(planes, width_bits, n_outputs=2, n_inputs=3)
        assert found.tolist() == [[1, 3, 5], [2, 4, 6]]
