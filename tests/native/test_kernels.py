"""Every compiled implementation that this processor runs, against the torch definitions."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_tool.experts.gate import gate_output
from moe_tool.native import kernels
from moe_tool.native.kernels import Gate, NativeExpert, NativeLinear, set_threads
from moe_tool.quantization.bit_packing import pack
from moe_tool.quantization.round_to_nearest import dequantize, quantize, tile_rows
from moe_tool.quantization.tokens import round_trip_tokens
from moe_tool.quantization.weights import FloatWeight, IntegerWeight

compiled = pytest.importorskip("moe_tool.native._kernels")
BEST = compiled.in_use()
ANY_SHAPE = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def random_weight(
    n_out: int, n_in: int, bits: int, group: int, seed: int, *, zeros: bool = False
) -> IntegerWeight:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n_out, n_in), generator=draw, dtype=torch.uint8)
    shape = (n_out, -(-n_in // group))
    return IntegerWeight(
        planes=pack(codes, bits),
        scales=tile_rows(torch.randn(shape, generator=draw).half()),
        zeros=tile_rows((torch.rand(shape, generator=draw) * 2**bits).half()) if zeros else None,
        width_bits=bits,
        group=group,
        n_outputs=n_out,
        n_inputs=n_in,
    )


@ANY_SHAPE
@given(
    bits=st.integers(1, 8),
    group=st.sampled_from([32, 64, 128]),
    n_tokens=st.integers(0, 35),
    n_out=st.integers(1, 50),
    n_in=st.integers(1, 400),
    zeros=st.booleans(),
    of_bits=st.sampled_from([None, 3, 4]),
    seed=st.integers(0, 99),
)
def test_integer_products_are_those_of_the_definition(
    implementation: str,
    bits: int,
    group: int,
    n_tokens: int,
    n_out: int,
    n_in: int,
    zeros: bool,
    of_bits: int | None,
    seed: int,
) -> None:
    weight = random_weight(n_out, n_in, bits, group, seed, zeros=zeros)
    if bits == 2 and not zeros:
        weight = replace(weight, of_bits=of_bits)
    x = torch.randn(n_tokens, n_in, generator=torch.Generator().manual_seed(seed))
    tokens, plain = round_trip_tokens(x, group).double(), dequantize(weight).double()
    size = F.linear(tokens.abs(), plain.abs()) + 2**bits * tokens.abs().sum(-1, keepdim=True)
    error = (NativeLinear(weight, None).forward(x) - F.linear(tokens, plain)).abs()
    assert (error <= 1e-5 * size + 1e-30).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_integer_part_is_exact(implementation: str, bits: int) -> None:
    """Scales that are powers of two and few terms: every float on the way is a whole number."""
    n_out, n_in = 37, 96
    draw = torch.Generator().manual_seed(bits)
    weight = random_weight(n_out, n_in, bits, 32, bits)
    weight.scales.fill_(1.0)
    x = torch.randint(-127, 128, (5, n_in), generator=draw).float()
    x[:, ::32] = 127  # the scale of every group of tokens is 1
    assert torch.equal(
        NativeLinear(weight, None).forward(x).double(),
        F.linear(x.double(), dequantize(weight).double()),
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_long_rows_do_not_overflow(implementation: str, bits: int) -> None:
    n_in = 100_032
    weight = random_weight(3, n_in, bits, 128, 0)
    for plane in weight.planes:
        plane.fill_(0xFF)  # the largest code everywhere
    weight.scales.fill_(1.0)
    x = torch.full((1, n_in), 127.0)
    largest = 2 ** (bits - 1) - 1
    expected = torch.full((1, 3), float(largest * 127 * n_in))
    torch.testing.assert_close(NativeLinear(weight, None).forward(x), expected, rtol=1e-6, atol=0)


@ANY_SHAPE
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    n_tokens=st.integers(0, 9),
    n_out=st.integers(1, 40),
    n_in=st.integers(1, 200),
    with_bias=st.booleans(),
)
def test_float_products(
    implementation: str, dtype: torch.dtype, n_tokens: int, n_out: int, n_in: int, with_bias: bool
) -> None:
    draw = torch.Generator().manual_seed(n_in)
    x = torch.randn(n_tokens, n_in, generator=draw)
    values = torch.randn(n_out, n_in, generator=draw).to(dtype)
    bias = FloatWeight(torch.randn(n_out, generator=draw).to(dtype)) if with_bias else None
    expected = F.linear(x.double(), values.double())
    if bias is not None:
        expected += bias.values.double()
    size = F.linear(x.double().abs(), values.double().abs()) + 4
    error = (NativeLinear(FloatWeight(values), bias).forward(x) - expected).abs()
    assert (error <= n_in * 2**-23 * size).all()


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_every_gate(implementation: str, name: str, interleaved: bool, gated: bool) -> None:
    if not gated and (interleaved or name == "clamped_swiglu"):
        pytest.skip("there is no such gate")
    gate = Gate(activation=name, gated=gated, interleaved=interleaved, alpha=1.702, limit=7.0)
    draw = torch.Generator().manual_seed(0)
    n_hidden, n_inner = 48, 70
    first = torch.randn((2 if gated else 1) * n_inner, n_hidden, generator=draw)
    second = torch.randn(n_hidden, n_inner, generator=draw)
    bias = torch.randn(first.shape[0], generator=draw)
    x = torch.randn(3, n_hidden, generator=draw)
    inner = gate_output(gate, F.linear(x, first) + bias)
    found = NativeExpert(FloatWeight(first), FloatWeight(bias), FloatWeight(second), None).forward(
        x, gate
    )
    torch.testing.assert_close(found, F.linear(inner, second), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("n_tokens", [1, 3, 33])
def test_a_fused_expert_is_its_parts(implementation: str, bits: int, n_tokens: int) -> None:
    gate = Gate(activation="silu", gated=True)
    draw = torch.Generator().manual_seed(1)
    first = quantize(torch.randn(2 * 150, 100, generator=draw) / 10, bits)
    second = quantize(torch.randn(100, 150, generator=draw) / 12, bits)
    x = torch.randn(n_tokens, 100, generator=draw)
    inner = gate_output(gate, NativeLinear(first, None).forward(x))
    parts = NativeLinear(second, None).forward(inner)
    # A rounding of exp may move a code of the inner tokens by one.
    found = NativeExpert(first, None, second, None).forward(x, gate)
    assert (found - parts).norm() <= 2e-3 * parts.norm()


def test_the_result_does_not_depend_on_threads_or_on_other_tokens(implementation: str) -> None:
    gate = Gate(activation="silu", gated=True)
    draw = torch.Generator().manual_seed(2)
    for bits in (8, 4, 3, 1):
        first = quantize(torch.randn(2 * 333, 200, generator=draw), bits)
        second = quantize(torch.randn(200, 333, generator=draw), bits)
        x = torch.randn(37, 200, generator=draw)
        set_threads(1)
        alone = [
            NativeExpert(first, None, second, None).forward(x[t : t + 1], gate) for t in range(37)
        ]
        for n_threads in (1, 2, 5):
            set_threads(n_threads)
            for _ in range(5):
                together = NativeExpert(first, None, second, None).forward(x, gate)
                assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_tokens_that_are_no_numbers_stay_so(implementation: str, bad: float) -> None:
    weight = random_weight(20, 100, 4, 64, 0)
    x = torch.ones(2, 100)
    x[1, 70] = bad
    found = NativeLinear(weight, None).forward(x)
    assert torch.isfinite(found[0]).all() and found[1].isnan().all()


def test_what_does_not_fit_is_refused_before_it_is_read() -> None:
    weight = random_weight(20, 100, 4, 64, 0)
    with pytest.raises(ValueError, match="tokens"):
        NativeLinear(weight, None).forward(torch.ones(1, 99))
    with pytest.raises(ValueError, match="tokens"):
        NativeLinear(weight, None).forward(torch.ones(1, 100, dtype=torch.float64))
    with pytest.raises(ValueError, match="bias"):
        NativeLinear(weight, FloatWeight(torch.ones(19))).forward(torch.ones(1, 100))
    shorter = IntegerWeight(
        planes=(weight.planes[0][:-64], weight.planes[1]), scales=weight.scales,
        width_bits=4, group=64, n_outputs=20, n_inputs=100,
    )  # fmt: skip
    with pytest.raises(ValueError, match="plane"):
        NativeLinear(shorter, None).forward(torch.ones(1, 100))
    fewer = IntegerWeight(
        planes=weight.planes, scales=weight.scales[:1],
        width_bits=4, group=64, n_outputs=20, n_inputs=100,
    )  # fmt: skip
    with pytest.raises(ValueError, match="scales"):
        NativeLinear(fewer, None).forward(torch.ones(1, 100))
    gate = Gate(activation="silu", gated=True)
    with pytest.raises(ValueError, match="fit together"):
        NativeExpert(weight, None, weight, None).forward(torch.ones(1, 100), gate)


def run_with(value: str) -> subprocess.CompletedProcess[str]:
    program = "from moe_tool.native.kernels import kernels_in_use; print(kernels_in_use())"
    return subprocess.run(
        [sys.executable, "-c", program],
        env={"PATH": "/usr/bin:/bin", kernels.ENVIRONMENT: value},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_environment_forces_an_implementation() -> None:
    assert run_with("scalar").stdout == "scalar\n"
    assert run_with("torch").stdout == "torch\n"
    assert run_with("").stdout == f"{BEST}\n"
    assert "is not known" in run_with("sse9").stderr
