"""One expert's output on the tokens that were routed to it."""

from collections.abc import Mapping
from typing import Any

import torch

from moe_tool.experts.linear import linear
from moe_tool.quantization.weights import FloatWeight, IntegerWeight


def expert_forward(
    module: Any, weights: Mapping[str, FloatWeight | IntegerWeight], x: torch.Tensor
) -> torch.Tensor:
    """Return one expert's output.

    Args:
        module: an experts module of transformers; its `has_gate`, `_apply_gate` or `act_fn`, and
            `has_post_expert_norm` are used, its parameters are not.
        weights: the expert's tensors by the module's parameter names. Matrices are [out, in]
            whatever the module's `is_transposed` says.
        x: [n, H] float32.

    Returns:
        [n, H] float32.
    """
    if module.has_gate:
        inner = _project(weights, "gate_up_proj", x)  # [n, 2I]
        inner = module._apply_gate(inner)  # [n, I]
    else:
        inner = module.act_fn(_project(weights, "up_proj", x))  # [n, I]
    output = _project(weights, "down_proj", inner)  # [n, H]
    if module.has_post_expert_norm:
        output = module.post_expert_norm(output)
    return output


def _project(
    weights: Mapping[str, FloatWeight | IntegerWeight], name: str, x: torch.Tensor
) -> torch.Tensor:
    bias = weights.get(f"{name}_bias")
    assert bias is None or isinstance(bias, FloatWeight), f"{name}_bias is not a vector of floats"
    return linear(x, weights[name], bias)
