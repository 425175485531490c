"""Products of kept codes: every compiled implementation against the torch definitions."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_tool.experts.linear import linear
from moe_tool.native import kernels
from moe_tool.native.kept import INTEGER_KINDS, token_group
from moe_tool.native.kernels import (
    Gate,
    NativeExpert,
    NativeLinear,
    are_tokens_int8,
    decode_kept,
    round_tokens,
    set_threads,
)
from moe_tool.quantization.kept_codes import KeptWeight, kept_product
from moe_tool.quantization.tokens import round_trip_tokens
from moe_tool.quantization.weights import FloatWeight
from tests.kept import FORMATS, draw_kept

compiled = pytest.importorskip("moe_tool.native._kernels")
BEST = compiled.in_use()
ANY_SHAPE = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
HALVES = st.integers(1, 250)
INTEGER = [name for name, of in FORMATS.items() if of.kind in INTEGER_KINDS]


def native_linear(x: torch.Tensor, weight: KeptWeight, bias: FloatWeight | None) -> torch.Tensor:
    return NativeLinear(weight, bias, int8_tokens=are_tokens_int8()).forward(x)


def tokens(n: int, n_in: int, seed: int) -> torch.Tensor:
    return torch.randn(n, n_in, generator=torch.Generator().manual_seed(seed))


def relative(found: torch.Tensor, x: torch.Tensor, weight: KeptWeight) -> float:
    """Largest error relative to the sum of the sizes of what is added."""
    decoded = weight.decode().double()
    wanted, sizes = x.double() @ decoded.T, x.double().abs() @ decoded.abs().T
    return float(((found - wanted).abs() / (sizes + 1e-30)).max())


@pytest.mark.parametrize("name", FORMATS)
@ANY_SHAPE
@given(n_out=st.integers(1, 40), half=HALVES, first=st.integers(0, 39))
def test_decoded_rows_are_those_of_the_definition(
    implementation: str, name: str, n_out: int, half: int, first: int
) -> None:
    weight = draw_kept(name, (n_out, 2 * half), seed=half)
    first = min(first, n_out - 1)
    found = decode_kept(weight, first, n_out)
    assert torch.equal(found.view(torch.int32), weight.decode(first).view(torch.int32))


def test_every_code_and_scale_of_8_bits_is_decoded(implementation: str) -> None:
    """Subnormal numbers too, and 2**-127."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[127, 255]] = 0
    exponents = torch.arange(120, dtype=torch.uint8)[:, None]
    small = torch.arange(127, dtype=torch.uint8)[:, None].view(torch.float8_e4m3fn)
    for scale in (exponents, small):
        weight = KeptWeight(
            codes=codes.expand(len(scale), 256).contiguous(), kind="e4m3", scale=scale,
            group=(1, 256),
        )  # fmt: skip
        found = decode_kept(weight, 0, len(scale))
        assert torch.equal(found.view(torch.int32), weight.decode().view(torch.int32))


@pytest.mark.parametrize("name", FORMATS)
@ANY_SHAPE
@given(n_tokens=st.integers(0, 9), n_out=st.integers(1, 40), half=HALVES, seed=st.integers(0, 9))
def test_products_are_close_to_double_precision(
    implementation: str, name: str, n_tokens: int, n_out: int, half: int, seed: int
) -> None:
    weight = draw_kept(name, (n_out, 2 * half), seed=seed)
    x = tokens(n_tokens, 2 * half, seed)
    bias = tokens(1, n_out, seed)[0]
    assert n_tokens == 0 or relative(native_linear(x, weight, None), x, weight) < 1e-6
    with_bias = native_linear(x, weight, FloatWeight(values=bias))
    assert torch.equal(with_bias, native_linear(x, weight, None) + bias)


@pytest.mark.parametrize("name", FORMATS)
def test_products_depend_on_no_other_row_token_or_thread(implementation: str, name: str) -> None:
    weight = draw_kept(name, (301, 416), seed=1)
    x = tokens(7, 416, 2)
    for to_int8 in (False, True):
        round_tokens(to_int8)
        set_threads(1)
        all_at_once = native_linear(x, weight, None)
        alone = torch.cat([native_linear(row[None], weight, None) for row in x])
        assert torch.equal(alone, all_at_once)
        set_threads(3)
        assert torch.equal(native_linear(x, weight, None), all_at_once)


@pytest.mark.parametrize("name", INTEGER)
@ANY_SHAPE
@given(n_tokens=st.integers(1, 5), n_out=st.integers(1, 20), half=HALVES, seed=st.integers(0, 9))
def test_products_with_int8_tokens_are_those_of_the_twin(
    implementation: str, name: str, n_tokens: int, n_out: int, half: int, seed: int
) -> None:
    weight = draw_kept(name, (n_out, 2 * half), seed=seed)
    x = tokens(n_tokens, 2 * half, seed)
    round_tokens(True)
    rounded = round_trip_tokens(x, token_group(weight.group[1]))
    assert relative(native_linear(x, weight, None), rounded, weight) < 1e-6


@pytest.mark.parametrize("kind", sorted(INTEGER_KINDS))
def test_sums_of_integers_are_exact(implementation: str, kind: str) -> None:
    """With scales of 1 every partial sum is a whole number of halves that float32 holds."""
    draw = torch.Generator().manual_seed(4)
    n_bytes = 256 if kind == "int8" else 128
    weight = KeptWeight(
        codes=torch.randint(0, 256, (9, n_bytes), generator=draw, dtype=torch.uint8),
        kind=kind, scale=torch.ones(9, 8), group=(1, 32),
    )  # fmt: skip
    x = torch.randint(-127, 128, (3, 256), generator=draw).float()
    x[:, ::32] = 127  # the scale of every group is 1
    wanted = (x.long() @ (2 * weight.decode()).long().T).float() / 2
    round_tokens(True)
    assert torch.equal(native_linear(x, weight, None), wanted)
    kept = kept_product(round_trip_tokens(x, 32), weight)
    assert torch.equal(kept, wanted)


@pytest.mark.parametrize("name", FORMATS)
def test_an_expert_is_its_two_products(implementation: str, name: str) -> None:
    first, second = draw_kept(name, (384, 160), seed=1), draw_kept(name, (160, 192), seed=2)
    biases = [FloatWeight(values=tokens(1, n, n)[0].bfloat16()) for n in (384, 160)]
    gate = Gate(activation="clamped_swiglu", gated=True, interleaved=True, alpha=1.702, limit=7.0)
    plain = Gate(activation="relu", gated=False)
    for to_int8 in (False, True):
        round_tokens(to_int8)
        x = tokens(3, 160, 5)
        product = native_linear(x, first, biases[0])
        left = product[:, ::2].clamp(max=7.0)
        up = product[:, 1::2].clamp(-7.0, 7.0)
        inner = (up + 1) * (left * torch.sigmoid(left * 1.702))
        wanted = native_linear(inner, second, biases[1])
        found = NativeExpert(first, biases[0], second, biases[1]).forward(x, gate)
        # A code of int8 may differ where the two sigmoids do.
        assert torch.allclose(found, wanted, rtol=1e-4, atol=0.1 if to_int8 else 1e-3)
    small = draw_kept(name, (192, 160), seed=3)
    round_tokens(False)
    inner = native_linear(x, small, None).clamp(min=0)
    found = NativeExpert(small, None, second, None).forward(x, plain)
    assert torch.equal(found, native_linear(inner, second, None))


def test_many_tokens_are_multiplied_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = draw_kept("mxfp4", (50, 64), seed=1), tokens(40, 64, 1)
    natively = linear(x, weight)
    assert relative(natively, x, weight) < 1e-6
    monkeypatch.setattr(kernels, "kernels_in_use", lambda: "torch")
    assert torch.equal(linear(x, weight), natively)
    assert relative(linear(x[:2], weight), x[:2], weight) < 1e-6


def test_groups_that_no_kernel_knows_are_refused() -> None:
    weight = KeptWeight(
        codes=torch.zeros(2, 96, dtype=torch.uint8), kind="int4", scale=torch.ones(2, 4),
        group=(1, 48),
    )  # fmt: skip
    with pytest.raises(ValueError, match="48"):
        native_linear(torch.zeros(1, 192), weight, None)
