"""Upcycling of a trained dense model to a mixture of experts."""

import copy

import torch
from transformers import MixtralConfig, MixtralForCausalLM


def upcycle(
    dense: MixtralForCausalLM, *, n_experts: int, top_k: int, redrawn_share: float, seed: int
) -> MixtralForCausalLM:
    """Return a mixture whose experts are partly redrawn copies of `dense`'s feed-forward layers.

    Everything else is copied; the router is new. In each expert a random `redrawn_share` of the
    inner channels (rows of gate and up, columns of down) is replaced by normal numbers with the
    mean and spread of the tensor they replace.
    Source: Drop-Upcycling, arXiv:2502.19261, section 3 (there r = 0.5 was best too).

    Args:
        dense: the same architecture with one expert, which every token uses.
        redrawn_share: 0 (equal experts) to 1 (all channels new).
    """
    config: MixtralConfig = copy.deepcopy(dense.config)
    config.num_local_experts, config.num_experts_per_tok = n_experts, top_k
    generator = torch.Generator().manual_seed(seed)
    mixture = MixtralForCausalLM(config)
    source = dense.state_dict()
    target = mixture.state_dict()
    with torch.no_grad():
        for name, tensor in target.items():
            if name.endswith("mlp.gate.weight"):  # [E, H]
                tensor.normal_(0, config.initializer_range, generator=generator)
            elif source[name].shape == tensor.shape:
                tensor.copy_(source[name])
            else:
                tensor.copy_(source[name].expand_as(tensor))  # [1, ...] -> [E, ...]
        for layer in range(config.num_hidden_layers):
            experts = f"model.layers.{layer}.mlp.experts."
            _redraw_channels(
                target[experts + "gate_up_proj"],
                target[experts + "down_proj"],
                share=redrawn_share,
                generator=generator,
            )
    mixture.load_state_dict(target)
    return mixture


def _redraw_channels(
    gate_up: torch.Tensor, down: torch.Tensor, *, share: float, generator: torch.Generator
) -> None:
    """Redraw a share of each expert's channels in place.

    Args:
        gate_up: [E, 2I, H], gate first.
        down: [E, H, I].
    """
    n_experts, _, inner = down.shape
    n_redrawn = round(share * inner)
    for expert_id in range(n_experts):
        channels = torch.randperm(inner, generator=generator)[:n_redrawn]
        for half in (
            gate_up[expert_id, :inner],
            gate_up[expert_id, inner:],
            down[expert_id].T,
        ):  # each [I, H]
            mean, spread = half.mean(), half.std()
            half[channels] = mean + spread * torch.randn(
                n_redrawn, half.shape[1], generator=generator
            )
