"""Rows of a MoLE's experts: what every expert of every layer adds for a token id."""

import torch

from moe_tool.models.mole.modeling import MoleForCausalLM, MoleLayer


def expert_rows(model: MoleForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Return the rows of token ids [n] as [n, L * N * d], each layer's own norm folded in.

    Args:
        model: its experts are networks.
    """
    with torch.inference_mode():
        embedded = model.model.embed_tokens(ids)
        layers = []
        for layer in model.model.layers:
            assert isinstance(layer, MoleLayer)
            layers.append(layer.expert_rows(embedded))
        return torch.stack(layers, dim=1).flatten(1)  # [n, L, N, d]
