"""Compiled products over channels against the torch definition, and reads of runs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_tool.experts.gate import gate_output
from moe_tool.native import channels as native
from moe_tool.native.channels import native_channels, read_runs
from moe_tool.native.kernels import Gate, set_threads
from moe_tool.quantization.channels import dequantize_channels
from tests.native.test_kernels import ANY_SHAPE
from tests.quantization.test_channels import random_channels

compiled = pytest.importorskip("moe_tool.native._kernels")
BEST = compiled.in_use()
SWIGLU = Gate(activation="silu", gated=True)


@ANY_SHAPE
@given(
    n_channels=st.integers(1, 60),
    n_hidden=st.integers(1, 300),
    n_tokens=st.integers(1, 6),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([32, 64, 128]),
    is_gate=st.booleans(),
    has_bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_it_is_the_sum_over_the_wanted_channels(
    implementation: str,
    n_channels: int,
    n_hidden: int,
    n_tokens: int,
    bits: int,
    group: int,
    is_gate: bool,
    has_bias: bool,
    seed: int,
) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = random_channels(n_channels, n_hidden, bits, group, seed)
    wanted = torch.nonzero(torch.rand(n_channels, generator=draw) < 0.5).flatten()
    x = torch.randn(n_tokens, n_hidden, generator=draw)
    values = torch.randn(n_tokens, len(wanted), generator=draw)
    bias = torch.randn(len(wanted), generator=draw) if has_bias else None
    set_threads(1 + seed % 3)
    # What is not wanted may hold anything, NaN among its scales too.
    weight.chunks[[c for c in range(n_channels) if c not in wanted.tolist()]] = 255
    found = native_channels(
        weight, SWIGLU, x, values, index=wanted.int(), is_gate=is_gate, bias=bias
    )
    rows, columns = (part.double() for part in dequantize_channels(weight.take(wanted)))
    other = x.double() @ rows.T + (0 if bias is None else bias.double())
    halves = (values.double(), other) if is_gate else (other, values.double())
    inner = gate_output(SWIGLU, torch.cat(halves, dim=1))
    size = (inner.abs() @ columns.abs()).max() if len(wanted) else 1.0
    assert ((found - inner @ columns).abs() <= 1e-5 * size + 1e-30).all()


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu", "relu", "clamped_swiglu"])
def test_every_gate_is_known_whatever_its_order(activation: str) -> None:
    gate = Gate(activation=activation, gated=True, interleaved=True, alpha=1.7, limit=7.0)
    weight = random_channels(20, 64)
    x, values = torch.randn(2, 64), torch.randn(2, 20)
    found = native_channels(weight, gate, x, values, index=None, is_gate=True, bias=None)
    rows, columns = dequantize_channels(weight)
    product = torch.cat([values, x @ rows.T], dim=1)
    wanted = gate_output(replace(gate, interleaved=False), product) @ columns
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_masked_is_gathered_to_the_last_bit_at_any_number_of_threads(implementation: str) -> None:
    weight = random_channels(300, 500)
    x, values = torch.randn(1, 500), torch.randn(1, 300)
    wanted = torch.nonzero(values[0].abs() > 1).flatten()
    masked = torch.where(values.abs() > 1, values, 0.0)  # an up projection of 0 closes a channel
    found = []
    for n_threads in (1, 2, 5):
        set_threads(n_threads)
        found.append(
            native_channels(weight, SWIGLU, x, masked, index=None, is_gate=False, bias=None)
        )
        found.append(
            native_channels(
                weight, SWIGLU, x, values[:, wanted], index=wanted.int(), is_gate=False, bias=None
            )
        )
    assert all(torch.equal(each, found[0]) for each in found)


def test_a_token_does_not_know_of_others(implementation: str) -> None:
    weight = random_channels(33, 70)
    x, values = torch.randn(6, 70), torch.randn(6, 33)
    together = native_channels(weight, SWIGLU, x, values, index=None, is_gate=True, bias=None)
    for at in range(6):
        alone = native_channels(
            weight, SWIGLU, x[at : at + 1], values[at : at + 1], index=None, is_gate=True, bias=None
        )
        assert torch.equal(alone[0], together[at])


@pytest.mark.parametrize("index", [[0, 20], [-1, 3], [5]])
def test_what_does_not_fit_is_refused(index: list[int]) -> None:
    weight = random_channels(20, 64)
    with pytest.raises(ValueError, match="do not fit"):
        native_channels(
            weight,
            SWIGLU,
            torch.zeros(1, 64),
            torch.zeros(1, 2),
            index=torch.tensor(index, dtype=torch.int32),
            is_gate=True,
            bias=None,
        )


@pytest.mark.parametrize("is_built", [True, False])
def test_runs_come_to_their_places(
    is_built: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native.kernels, "is_built", lambda: is_built)
    data = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8)
    (tmp_path / "f").write_bytes(data.tobytes())
    with open(tmp_path / "f", "rb") as file:
        out = torch.full((900,), 7, dtype=torch.uint8)
        runs = np.array([[0, 10], [50, 1], [880, 20]])
        assert read_runs(file.fileno(), 100, runs, out) == 31
        wanted = np.full(900, 7, dtype=np.uint8)
        for at, n_bytes in runs:
            wanted[at : at + n_bytes] = data[100 + at : 100 + at + n_bytes]
        assert (out.numpy() == wanted).all()
        assert read_runs(file.fileno(), 950, np.array([[0, 100]]), out) == 50  # the file ends
        assert read_runs(file.fileno(), 0, np.zeros((0, 2)), out) == 0
        for wrong in ([[890, 11]], [[-1, 5]]):
            with pytest.raises(ValueError, match="beyond"):
                read_runs(file.fileno(), 0, np.array(wrong), out)
    with pytest.raises(OSError, match="descriptor"):
        read_runs(file_closed(tmp_path / "f"), 0, np.array([[0, 1]]), out)


def file_closed(path: Path) -> int:
    with open(path, "rb") as file:
        return file.fileno()
