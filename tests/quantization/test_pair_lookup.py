"""Two-bit codes of weights and tokens: packing, tables, and the product without kernels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.quantization.pair_lookup import (
    check_pair_product,
    look_up_pairs,
    pack_pair_tokens,
    pack_pair_weights,
    pair_tables,
)

ANY_SHAPE = settings(max_examples=40, deadline=None)
BOOKS = st.lists(st.integers(-128, 127), min_size=4, max_size=4)


def codes(n: int, n_in: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 4, (n, n_in), dtype=torch.uint8, generator=draw)


def book(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int8)


def test_the_bytes_are_as_they_are_described() -> None:
    matrix = torch.zeros(130, 5, dtype=torch.uint8)
    matrix[129, 3], matrix[129, 1], matrix[2, 4] = 2, 3, 1
    packed = pack_pair_weights(matrix).codes
    assert packed.shape == (2, 2, 128)  # 130 outputs fill a second tile, 5 inputs a second quad
    assert packed[1, 0, 1] == 0b10001100
    assert packed[0, 1, 2] == 0b00000001
    assert packed.count_nonzero() == 2
    tokens = pack_pair_tokens(torch.tensor([[1, 2, 3]], dtype=torch.uint8)).codes
    assert tokens.tolist() == [[0b10010000, 0b00110000]]


def test_weights_take_a_quarter_byte_each() -> None:
    assert pack_pair_weights(codes(256, 64, 0)).codes.numel() == 256 * 64 // 4


@given(weight_values=BOOKS, token_values=BOOKS)
def test_tables_hold_every_sum_of_two_products(
    weight_values: list[int], token_values: list[int]
) -> None:
    tables = pair_tables(book(weight_values), book(token_values))
    assert min(tables.quads_per_widening) >= 2  # eight codes' products fit into a byte at least
    for a in range(16):
        for w in range(16):
            digits = [int(plane[a, w]) for plane in tables.planes]
            assert tables.smallest + sum(
                digit << (tables.digit_bits * d) for d, digit in enumerate(digits)
            ) == (
                token_values[a & 3] * weight_values[w & 3]
                + token_values[a >> 2] * weight_values[w >> 2]
            )


def test_the_paper_s_codes_need_one_digit_and_are_widened_after_seven_quads() -> None:
    tables = pair_tables(book([-1, 0, 1, 2]), book([0, 1, 2, 3]))
    # Sums of two products are -6 to 12; 14 times 18 is 252, 16 times would not fit.
    assert (tables.smallest, len(tables.planes), tables.quads_per_widening) == (-6, 1, (7,))


@ANY_SHAPE
@given(
    weight_values=BOOKS,
    token_values=BOOKS,
    n=st.integers(0, 5),
    n_out=st.integers(1, 9),
    n_in=st.integers(1, 30),
)
def test_the_product_is_that_of_the_whole_numbers(
    weight_values: list[int], token_values: list[int], n: int, n_out: int, n_in: int
) -> None:
    weights, tokens = codes(n_out, n_in, 1), codes(n, n_in, 2)
    weight_book, token_book = book(weight_values), book(token_values)
    found = look_up_pairs(
        pack_pair_weights(weights), pack_pair_tokens(tokens), pair_tables(weight_book, token_book)
    )
    wanted = token_book[tokens.long()].long() @ weight_book[weights.long()].long().T
    assert torch.equal(found.long(), wanted)


def test_what_is_no_code_or_no_code_book_is_refused() -> None:
    with pytest.raises(ValueError, match="a code is 4"):
        pack_pair_weights(torch.full((2, 2), 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="uint8"):
        pack_pair_tokens(torch.zeros(2, 0, dtype=torch.uint8))
    with pytest.raises(ValueError, match="code book"):
        pair_tables(book([0, 1, 2]), book([0, 1, 2, 3]))
    weights, tables = pack_pair_weights(codes(3, 8, 0)), pair_tables(*[book([0, 1, 2, 3])] * 2)
    with pytest.raises(ValueError, match="8"):
        check_pair_product(weights, pack_pair_tokens(codes(1, 9, 0)), tables)


def test_sums_that_may_not_fit_into_32_bits_are_refused() -> None:
    largest = pair_tables(book([-128] * 4), book([-128] * 4))
    fits, beyond = (torch.zeros(1, 2**17 + n, dtype=torch.uint8) for n in (-1, 0))
    check_pair_product(pack_pair_weights(fits), pack_pair_tokens(fits), largest)
    with pytest.raises(ValueError, match="32 bits"):
        check_pair_product(pack_pair_weights(beyond), pack_pair_tokens(beyond), largest)
