"""Differentiable weighted sum of a layer's experts, by their inputs and gate weights.

The experts are fixed. The forward computes them as a run does; the backward fetches them again and
expands one at a time to float32. The integer kernels' rounding of tokens has no gradient and is
treated as exact.
"""

from typing import Any

import torch
import torch.nn.functional as F

from moe_tool.experts.combine import Supply, run_experts
from moe_tool.quantization.round_to_nearest import dequantize
from moe_tool.quantization.weights import ExpertWeights, FloatWeight, IntegerWeight


def weighed_experts(
    module: Any, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, supply: Supply
) -> torch.Tensor:
    """Return the weighted sum of the experts' outputs, [T, H]; see `run_experts`.

    Args:
        module: an experts module of transformers.
        hidden: [T, H] float32.
        index: [T, K] int64; slots below 0 or from E on are skipped.
        weight: [T, K] float32.
        supply: fetches experts, once in the forward and once in the backward.
    """
    made: torch.Tensor = _Weighed.apply(hidden, weight, module, index, supply)  # type: ignore[no-untyped-call]
    return made


class _Weighed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        module: Any,
        index: torch.Tensor,
        supply: Supply,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.module, ctx.index, ctx.supply = module, index, supply
        return run_experts(module, hidden, index, weight, supply)

    @staticmethod
    def backward(ctx: Any, by_output: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight = ctx.saved_tensors
        index: torch.Tensor = ctx.index
        by_hidden, by_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        is_one = (index >= 0) & (index < ctx.module.num_experts)
        wanted = torch.unique(index[is_one]).tolist()
        for expert, weights in ctx.supply(wanted):
            rows, slots = torch.nonzero(index == expert, as_tuple=True)
            coming = by_output[rows]  # [n, H]
            with torch.enable_grad():
                x = hidden[rows].detach().requires_grad_()
                y = _expanded_forward(ctx.module, weights, x)
            (by_x,) = torch.autograd.grad(y, x, coming * weight[rows, slots, None])
            by_hidden.index_add_(0, rows, by_x)
            by_weight[rows, slots] = (coming * y.detach()).sum(dim=1)
        return by_hidden, by_weight, None, None, None


def _expanded_forward(module: Any, weights: ExpertWeights, x: torch.Tensor) -> torch.Tensor:
    """Return the result of `expert_forward` in float32, differentiable in `x`."""
    inner = _product(weights, "gate_up_proj" if module.has_gate else "up_proj", x)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    output = _product(weights, "down_proj", inner)
    normed: torch.Tensor = (
        module.post_expert_norm(output) if module.has_post_expert_norm else output
    )
    return normed


def _product(weights: ExpertWeights, name: str, x: torch.Tensor) -> torch.Tensor:
    bias = weights.get(f"{name}_bias")
    return F.linear(x, _values(weights[name]), None if bias is None else _values(bias))


def _values(weight: FloatWeight | IntegerWeight) -> torch.Tensor:
    return dequantize(weight) if isinstance(weight, IntegerWeight) else weight.values.float()
