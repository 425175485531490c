"""Output of one expert on the tokens routed to it."""

from collections.abc import Mapping
from typing import Any

import torch

from moe_tool.experts.channel_forward import channel_forward
from moe_tool.experts.gate import gate_of
from moe_tool.experts.linear import computes_natively, linear
from moe_tool.native.kernels import NativeExpert
from moe_tool.quantization.channels import ChannelExpert
from moe_tool.quantization.weights import AnyWeight, ExpertWeights, FloatWeight


def expert_forward(module: Any, weights: Mapping[str, AnyWeight], x: torch.Tensor) -> torch.Tensor:
    """Return one expert's output, [n, H] float32.

    Args:
        module: an experts module of transformers; its `has_gate`, `_apply_gate` or `act_fn`, and
            `has_post_expert_norm` are used, its parameters are not.
        weights: the expert's tensors by the module's parameter names, a low-rank map's tensors, or
            an expert in channels. Matrices are [out, in] whatever the module's `is_transposed`
            says. Sets the `prepared` of an ExpertWeights.
        x: [n, H] float32.
    """
    if isinstance(weights, ChannelExpert):
        output = channel_forward(module, weights, x)
        return module.post_expert_norm(output) if module.has_post_expert_norm else output
    if "low_rank_in" in weights:
        inner = linear(x, weights["low_rank_in"])  # [n, rank]
        offset = weights["low_rank_offset"]
        assert isinstance(offset, FloatWeight)
        return linear(inner, weights["low_rank_out"], offset)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    gate = gate_of(module) if computes_natively(weights[first], x.shape[0]) else None
    if gate is not None:
        # the inner product never leaves the kernel's scratch
        output = _described(weights, first).forward(x, gate)  # [n, H]
    else:
        inner = inner_activations(module, weights, x)  # [n, I]
        output = linear(inner, weights["down_proj"], _bias(weights, "down_proj"))  # [n, H]
    if module.has_post_expert_norm:
        output = module.post_expert_norm(output)
    return output


def inner_activations(
    module: Any, weights: Mapping[str, AnyWeight], x: torch.Tensor
) -> torch.Tensor:
    """Return the input of an expert's down matrix, [n, I] float32; see `expert_forward`."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    inner = linear(x, weights[first], _bias(weights, first))  # [n, 2I] or [n, I]
    found: torch.Tensor = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    return found


def _described(weights: Mapping[str, AnyWeight], first: str) -> NativeExpert:
    """Return the kernels' description of the weights, cached in an ExpertWeights."""
    if isinstance(weights, ExpertWeights) and weights.prepared is not None:
        prepared: NativeExpert = weights.prepared
        return prepared
    prepared = NativeExpert(
        weights[first],
        _bias(weights, first),
        weights["down_proj"],
        _bias(weights, "down_proj"),
    )
    if isinstance(weights, ExpertWeights):
        weights.prepared = prepared
    return prepared


def _bias(weights: Mapping[str, AnyWeight], name: str) -> FloatWeight | None:
    bias = weights.get(f"{name}_bias")
    assert bias is None or isinstance(bias, FloatWeight), f"{name}_bias is not a vector of floats"
    return bias
