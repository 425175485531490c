"""Forward pass of experts in channels: selection of a token's channels, and the output from those
alone (FloE, arXiv:2505.05950)."""

from dataclasses import replace
from functools import cache
from typing import Any

import torch

from moe_tool.errors import UnsupportedModelError
from moe_tool.experts.gate import gate_of, gate_output
from moe_tool.experts.linear import linear
from moe_tool.native.channels import computes_channels, native_channels
from moe_tool.native.kernels import Gate
from moe_tool.quantization.channels import (
    ChannelExpert,
    ChosenChannels,
    Selector,
    dequantize_channels,
)

_BLOCK = 2**18
"""Weights expanded at a time"""


def channel_gate(module: Any) -> Gate:
    """Return the gate of an experts module.

    Raises:
        UnsupportedModelError: it has none, or an unknown one.
    """
    gate = gate_of(module)
    if gate is None or not gate.gated:
        raise UnsupportedModelError(
            f"{type(module).__name__}: only experts with a known gate have channels",
            hint="pack without --sparse-experts",
        )
    return gate


def split_halves(gate: Gate, joined: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of the gate and of the up projection, [I, ...] each, of [2I, ...]."""
    if gate.interleaved:
        return joined[::2], joined[1::2]
    half = len(joined) // 2
    return joined[:half], joined[half:]


@torch.no_grad()
def selector_values(module: Any, selector: Selector, x: torch.Tensor) -> torch.Tensor:
    """Return the selector matrix's product with tokens [n, H], bias included, [n, I] float32."""
    values = linear(x, selector.weight)
    bias = selector.biases.get("gate_up_proj_bias")
    if bias is not None:
        gates, ups = split_halves(channel_gate(module), bias.values)
        values += (gates if selector.is_gate else ups).float()
    return values


def channel_sizes(module: Any, selector: Selector, values: torch.Tensor) -> torch.Tensor:
    """Return the channel sizes that thresholds are compared with, [n, I] float32, from
    `selector_values`.

    It is the absolute inner activation with 1 in place of the other matrix's output. So for a gate
    it is |silu(gate)|, not |gate|: a gate far below 0 closes its channel.
    """
    other = torch.ones_like(values)
    halves = (values, other) if selector.is_gate else (other, values)
    return gate_output(_joined(channel_gate(module)), torch.cat(halves, dim=1)).abs()


@torch.no_grad()
def choose_channels(
    module: Any, selector: Selector, x: torch.Tensor, sparsity: float
) -> ChosenChannels:
    """Return the channels that one token [1, H] needs; `sparsity` is the share that is skipped on
    the text behind the thresholds."""
    values = selector_values(module, selector, x)  # [1, I]
    if sparsity == 0:
        kept = torch.arange(values.shape[1])
    else:
        sizes = channel_sizes(module, selector, values)[0]
        kept = torch.nonzero(sizes >= selector.threshold(sparsity)).flatten()
    return ChosenChannels(index=kept.to(torch.int32), values=values.index_select(1, kept))


@torch.no_grad()
def channel_forward(module: Any, expert: ChannelExpert, x: torch.Tensor) -> torch.Tensor:
    """Return the expert's output from the chosen channels of a single token, or from all, [n, H]
    float32.

    The sum over channels of act(gate) * up * column omits the others; its terms and their order do
    not change.
    """
    selector, chosen = expert.selector, expert.chosen
    assert selector is not None
    gate = channel_gate(module)
    index = None if chosen is None else chosen.index
    values = selector_values(module, selector, x) if chosen is None else chosen.values  # [n, C]
    bias = _other_bias(gate, selector, index)
    if computes_channels(x.shape[0]):
        out = native_channels(
            expert.channels, gate, x, values, index=index, is_gate=selector.is_gate, bias=bias
        )
    else:
        out = _expanded(expert, gate, x, values, bias)
    last = selector.biases.get("down_proj_bias")
    return out if last is None else out.add_(last.values.float())


def _other_bias(gate: Gate, selector: Selector, index: torch.Tensor | None) -> torch.Tensor | None:
    """Return the bias of the matrix that does not select channels, [C] float32."""
    bias = selector.biases.get("gate_up_proj_bias")
    if bias is None:
        return None
    gates, ups = split_halves(gate, bias.values)
    other = (ups if selector.is_gate else gates).float()
    return other if index is None else other.index_select(0, index)


def _expanded(
    expert: ChannelExpert,
    gate: Gate,
    x: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Compute the output in torch: the definition that the compiled kernels have to match."""
    assert expert.selector is not None
    index = torch.arange(expert.channels.n_channels)
    if expert.chosen is not None:
        index = expert.chosen.index.long()
    out = torch.zeros_like(x)
    step = max(1, _BLOCK // expert.channels.n_hidden)
    for start in range(0, len(index), step):
        part = slice(start, start + step)
        rows, columns = dequantize_channels(expert.channels.take(index[part]))
        other = x @ rows.T  # [n, c]
        if bias is not None:
            other += bias[part]
        halves = (values[:, part], other) if expert.selector.is_gate else (other, values[:, part])
        out += gate_output(_joined(gate), torch.cat(halves, dim=1)) @ columns
    return out


@cache
def _joined(gate: Gate) -> Gate:
    return replace(gate, interleaved=False)
