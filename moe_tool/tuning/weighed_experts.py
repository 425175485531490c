"""Differentiable weighted sum of a layer's experts, by their inputs and gate weights.

The experts are fixed. The forward computes them as a run does; the backward fetches them again and
expands one at a time to float32. The integer kernels' rounding of tokens has no gradient and is
treated as exact.
"""

from typing import Any

import torch
import torch.nn.functional as F

from moe_tool.experts.combine import Supply, run_experts
from moe_tool.quantization.kept_codes import KeptWeight
from moe_tool.quantization.round_to_nearest import dequantize
from moe_tool.quantization.weights import AnyWeight, ExpertWeights, IntegerWeight


def weighed_experts(
    module: Any,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    supply: Supply,
    *,
    present: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the weighted sum of the experts' outputs, [T, H]; see `run_experts`.

    Args:
        module: an experts module of transformers.
        hidden: [T, H] float32.
        index: [T, K] int64 expert ids.
        weight: [T, K] float32.
        supply: fetches experts, once in the forward and once in the backward.
        present: [T, K] bool: slots that are computed; None: all of them.
    """
    if present is None:
        present = torch.ones(index.shape, dtype=torch.bool)
    made: torch.Tensor = _Weighed.apply(hidden, weight, module, index, present, supply)  # type: ignore[no-untyped-call]
    return made


class _Weighed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        module: Any,
        index: torch.Tensor,
        present: torch.Tensor,
        supply: Supply,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.module, ctx.index, ctx.present, ctx.supply = module, index, present, supply
        return run_experts(module, hidden, index, weight, supply, present=present)

    @staticmethod
    def backward(ctx: Any, by_output: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight = ctx.saved_tensors
        index: torch.Tensor = ctx.index
        present: torch.Tensor = ctx.present
        by_hidden, by_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        for expert, weights in ctx.supply(torch.unique(index[present]).tolist()):
            rows, slots = torch.nonzero((index == expert) & present, as_tuple=True)
            coming = by_output[rows]  # [n, H]
            with torch.enable_grad():
                x = hidden[rows].detach().requires_grad_()
                y = _expanded_forward(ctx.module, weights, x)
            (by_x,) = torch.autograd.grad(y, x, coming * weight[rows, slots, None])
            by_hidden.index_add_(0, rows, by_x)
            by_weight[rows, slots] = (coming * y.detach()).sum(dim=1)
        return by_hidden, by_weight, None, None, None, None


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


def _values(weight: AnyWeight) -> torch.Tensor:
    if isinstance(weight, KeptWeight):
        return weight.decode()
    return dequantize(weight) if isinstance(weight, IntegerWeight) else weight.values.float()
