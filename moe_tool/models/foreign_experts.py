"""Adapters of experts modules that lack transformers' experts interface."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import use_experts_implementation


def adapt_experts(model: PreTrainedModel) -> None:
    """Give experts modules that lack it transformers' experts interface; changes the model."""
    for name, module in list(model.named_modules()):
        adapter = _ADAPTERS.get(type(module).__name__)
        if adapter is not None:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, adapter(module, _config_of(model)))


def _config_of(model: PreTrainedModel) -> PreTrainedConfig:
    config: PreTrainedConfig = model.config.get_text_config()
    return config


class Llama4Block(nn.Module):
    """Llama-4's mixture with its experts called for the chosen tokens only.

    Its gate weights scale the experts' inputs, so that the sum of outputs has weights of one.
    """

    def __init__(self, block: Any, config: PreTrainedConfig) -> None:
        """Take over the modules of transformers' block, under the same names."""
        super().__init__()
        self.top_k = block.top_k
        self.router = Llama4Router(block.router)
        self.shared_expert = block.shared_expert
        self.experts = _with_interface(block.experts, config, is_transposed=True)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mixture's output [T, H] and the router logits [T, E]."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits, scores, index = self.router(rows)
        output = self.shared_expert(rows)
        for slot in range(self.top_k):
            gate = scores[:, slot : slot + 1]
            output.add_(self.experts(rows * gate, index[:, slot : slot + 1], torch.ones_like(gate)))
        return output, logits


class Llama4Router(nn.Module):
    """Llama-4's router, with chosen experts in its output."""

    def __init__(self, router: Any) -> None:
        """Share the parameter of transformers' router."""
        super().__init__()
        self.top_k = router.top_k
        self.weight = router.weight

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits [T, E], gate weights [T, K] and experts [T, K]."""
        logits = nn.functional.linear(hidden, self.weight)
        chosen, index = torch.topk(logits, self.top_k, dim=1)
        return logits, torch.sigmoid(chosen.float()).to(logits.dtype), index


def _with_interface(
    experts: Any, config: PreTrainedConfig, *, is_transposed: bool = False
) -> nn.Module:
    """Return an experts module that differs by transformers' interface alone."""
    declared = use_experts_implementation(
        type(f"Declared{type(experts).__name__}", (type(experts),), {}),
        is_transposed=is_transposed,
    )
    made: nn.Module = declared.__new__(declared)
    made.__dict__.update(experts.__dict__)
    made.config = config  # type: ignore[assignment]
    flags = {"has_gate": True, "is_concatenated": True, "is_transposed": is_transposed}
    for name in ("has_bias", "has_post_expert_norm", "_is_expert_parallel"):
        flags[name] = False
    made.__dict__.update(flags)
    return made


_ADAPTERS: dict[str, Any] = {"Llama4TextMoe": Llama4Block, "Step3p7Experts": _with_interface}
