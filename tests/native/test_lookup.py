"""What is looked up is what is multiplied: exactly, on any number of threads."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_tool.native import lookup_choice
from moe_tool.native.kernels import (
    Gate,
    NativeExpert,
    NativeLinear,
    is_native,
    pair_product,
    set_threads,
    use_lookup,
)
from moe_tool.native.lookup_choice import LookupTime, choose_lookup, chosen_tokens
from moe_tool.quantization.pair_lookup import (
    PairTokens,
    pack_pair_tokens,
    pack_pair_weights,
    pair_tables,
)
from moe_tool.quantization.round_to_nearest import quantize
from tests.native.test_kernels import random_weight

compiled = pytest.importorskip("moe_tool.native._kernels")
BEST = compiled.in_use()
ANY_SHAPE = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
BOOKS = st.lists(st.integers(-128, 127), min_size=4, max_size=4)


@pytest.fixture(params=[1, 2])
def looked_up(request: pytest.FixtureRequest, implementation: str) -> int:
    """A width that this implementation can look up."""
    bits: int = request.param
    if not use_lookup(bits, 0):
        pytest.skip(f"{implementation} kernels look no sums up")
    return bits


def codes(n: int, n_in: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 4, (n, n_in), dtype=torch.uint8, generator=draw)


def book(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int8)


@ANY_SHAPE
@given(
    weight_values=BOOKS,
    token_values=BOOKS,
    n=st.integers(0, 40),
    n_out=st.integers(1, 300),
    n_in=st.integers(1, 700),
    n_threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_pairs_are_the_product_of_whole_numbers(
    implementation: str,
    weight_values: list[int],
    token_values: list[int],
    n: int,
    n_out: int,
    n_in: int,
    n_threads: int,
    seed: int,
) -> None:
    set_threads(n_threads)
    weights, tokens = codes(n_out, n_in, seed), codes(n, n_in, seed + 1)
    weight_book, token_book = book(weight_values), book(token_values)
    found = pair_product(
        pack_pair_weights(weights), pack_pair_tokens(tokens), pair_tables(weight_book, token_book)
    )
    wanted = token_book[tokens.long()].long() @ weight_book[weights.long()].long().T
    assert torch.equal(found.long(), wanted)


@pytest.mark.parametrize(
    ("weight_values", "token_values"),
    [
        ([-1, 0, 1, 2], [0, 1, 2, 3]),
        ([-3, -1, 1, 3], [-3, -1, 1, 3]),
        ([-128, 0, 1, 127], [-127, 0, 1, 127]),
    ],
)
@pytest.mark.parametrize("code", range(4))
def test_a_hundred_thousand_largest_products_do_not_overflow(
    implementation: str, weight_values: list[int], token_values: list[int], code: int
) -> None:
    """Nothing wraps in a byte, nor in the 16 bits that bytes are widened to, nor in 32."""
    n_in = 100_000
    tables = pair_tables(book(weight_values), book(token_values))
    tokens = pack_pair_tokens(torch.full((5, n_in), code, dtype=torch.uint8))
    weights = torch.arange(4, dtype=torch.uint8)[:, None].expand(4, n_in)
    found = pair_product(pack_pair_weights(weights), tokens, tables)
    wanted = [n_in * token_values[code] * value for value in weight_values]
    assert found.tolist() == [wanted] * 5


def test_parts_that_do_not_fit_are_refused_before_they_are_read() -> None:
    tables = pair_tables(book([0, 1, 2, 3]), book([0, 1, 2, 3]))
    weights, tokens = pack_pair_weights(codes(9, 20, 0)), pack_pair_tokens(codes(3, 20, 0))
    for wrong in (
        replace(weights, n_outputs=129),
        replace(weights, codes=weights.codes.transpose(0, 1)),
    ):
        with pytest.raises(ValueError, match="a part is"):
            pair_product(wrong, tokens, tables)
    with pytest.raises(ValueError, match="a part is"):
        pair_product(weights, PairTokens(tokens.codes[:, 1:], 20), tables)
    with pytest.raises(ValueError, match="inputs"):
        pair_product(replace(weights, n_inputs=24), tokens, tables)


@ANY_SHAPE
@given(
    group=st.sampled_from([32, 64, 128, 256, 512]),
    n_tokens=st.integers(1, 9),
    n_out=st.integers(1, 70),
    n_in=st.integers(1, 700),
    zeros=st.booleans(),
    n_threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_sums_of_activations_give_the_same_to_the_last_bit(
    looked_up: int,
    group: int,
    n_tokens: int,
    n_out: int,
    n_in: int,
    zeros: bool,
    n_threads: int,
    seed: int,
) -> None:
    weight = random_weight(n_out, n_in, looked_up, group, seed, zeros=zeros)
    x = torch.randn(n_tokens, n_in, generator=torch.Generator().manual_seed(seed))
    set_threads(n_threads)
    use_lookup(looked_up, 0)
    multiplied = NativeLinear(weight, None).forward(x)
    use_lookup(looked_up, n_tokens)
    assert torch.equal(NativeLinear(weight, None).forward(x), multiplied)


def test_the_largest_sums_of_the_longest_group_fit(looked_up: int) -> None:
    n_in, group = 1024, 256 // looked_up
    for value, byte in itertools.product((127.0, -127.0), (0x00, 0xFF)):
        weight = random_weight(32, n_in, looked_up, group, 0)
        weight.planes[0].fill_(byte)
        weight.scales.fill_(1.0)
        x = torch.full((2, n_in), value)
        use_lookup(looked_up, 0)
        multiplied = NativeLinear(weight, None).forward(x)
        use_lookup(looked_up, 2)
        assert torch.equal(NativeLinear(weight, None).forward(x), multiplied)


def test_experts_too_and_only_up_to_the_number_of_tokens(looked_up: int) -> None:
    gate = Gate(activation="silu", gated=True)
    draw = torch.Generator().manual_seed(3)
    first = quantize(torch.randn(2 * 150, 100, generator=draw), looked_up)
    second = quantize(torch.randn(100, 150, generator=draw), looked_up)
    x = torch.randn(7, 100, generator=draw)
    x[2, 70] = torch.nan
    multiplied = NativeExpert(first, None, second, None).forward(x, gate)
    for limit, n_threads in itertools.product((3, 7), (1, 2)):
        set_threads(n_threads)
        use_lookup(looked_up, limit)
        found = NativeExpert(first, None, second, None).forward(x, gate)
        torch.testing.assert_close(found, multiplied, rtol=0, atol=0, equal_nan=True)
    assert found[2].isnan().all() and found[3].isfinite().all()


def test_other_widths_and_scalar_kernels_are_not_looked_up(implementation: str) -> None:
    assert not use_lookup(3, 1) and not use_lookup(0, 1)
    if implementation == "scalar":
        assert not use_lookup(1, 1)


def test_the_choice_ends_where_looking_up_is_not_worth_it() -> None:
    def row(tokens: int, lookup_s: float, bits: int = 1) -> LookupTime:
        return LookupTime(bits=bits, tokens=tokens, multiply_s=1.0, lookup_s=lookup_s)

    assert chosen_tokens((row(1, 0.5), row(4, 0.5), row(16, 0.5)), 1) == 16
    assert chosen_tokens((row(16, 0.97), row(4, 0.5), row(1, 0.5)), 1) == 4  # within the noise
    assert chosen_tokens((row(16, 0.5), row(4, 1.03), row(1, 0.97)), 1) == 16  # that too
    assert chosen_tokens((row(16, 0.5), row(4, 1.06), row(1, 0.5)), 1) == 1
    assert chosen_tokens((row(1, 1.5), row(4, 0.5)), 1) == 0
    assert chosen_tokens((row(1, 0.5, bits=2),), 1) == 0
    assert chosen_tokens((), 1) == 0


def test_both_ways_are_timed_once_and_the_faster_one_stays(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose_lookup.cache_clear()
    limits: list[tuple[int, int]] = []

    def record(bits: int, limit: int) -> bool:
        limits.append((bits, limit))
        return use_lookup(bits, limit)

    monkeypatch.setattr(lookup_choice, "use_lookup", record)
    try:
        times = choose_lookup()
        assert choose_lookup() is times
        if implementation == "scalar" or not is_native():
            assert times == ()
            return
        assert [(row.bits, row.tokens) for row in times] == [
            (1, 1), (1, 4), (1, 16), (2, 1), (2, 4), (2, 16),
        ]  # fmt: skip
        assert all(row.lookup_s > 0 and row.multiply_s > 0 for row in times)
        for bits in (1, 2):
            last = [limit for width, limit in limits if width == bits][-1]
            assert last == chosen_tokens(times, bits)
    finally:
        choose_lookup.cache_clear()
