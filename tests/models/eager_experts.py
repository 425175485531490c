"""Experts computed as transformers' eager loop does, from weights that a callable supplies."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from moe_tool.models.skeleton import LayerCall

Read = Callable[[int, int], dict[str, torch.Tensor]]


def eager_experts(read: Read) -> Callable[[LayerCall], torch.Tensor]:
    """Return an experts function: ascending experts, index_add_, float32."""

    def answer(call: LayerCall) -> torch.Tensor:
        final = torch.zeros_like(call.hidden)
        for expert in torch.unique(call.index).tolist():
            if expert >= call.module.num_experts:
                continue
            position, token = torch.where((call.index == expert).T)
            weights = {name: tensor.float() for name, tensor in read(call.layer, expert).items()}
            inner = F.linear(
                call.hidden[token], weights["gate_up_proj"], weights.get("gate_up_proj_bias")
            )
            inner = call.module._apply_gate(inner)
            output = F.linear(inner, weights["down_proj"], weights.get("down_proj_bias"))
            final.index_add_(0, token, output * call.weight[token, position, None])
        return final

    return answer


def read_once(read: Read) -> Read:
    """Return the same weights, asking `read` for each expert a single time."""
    kept: dict[tuple[int, int], dict[str, torch.Tensor]] = {}

    def remembered(layer: int, expert: int) -> dict[str, torch.Tensor]:
        if (layer, expert) not in kept:
            kept[layer, expert] = read(layer, expert)
        return kept[layer, expert]

    return remembered
