"""Tiny random MoLE checkpoints."""

from pathlib import Path
from typing import Any

import torch

from moe_tool.models.mole.config import MoleConfig
from moe_tool.models.mole.modeling import MoleForCausalLM
from tests.tiny_models import VOCABULARY, tiny_tokenizer


def tiny_config(**changes: Any) -> MoleConfig:
    """Return a configuration of 3 layers, 5 experts and width 32: rows of 480 values."""
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "num_experts": 5,
        "expert_intermediate_size": 40,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
    }
    return MoleConfig(**fields | changes)


def tiny_mole(seed: int = 0, **changes: Any) -> MoleForCausalLM:
    """Return a model in which every tensor matters: no norm is one."""
    torch.manual_seed(seed)
    model = MoleForCausalLM(tiny_config(**changes)).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape)
            tensor.copy_(
                1 + 0.3 * noise if "norm" in name else 1.5 * noise / tensor.shape[-1] ** 0.5
            )
    return model


def make_mole(folder: Path, *, dtype: str = "float32", seed: int = 0, **changes: Any) -> Path:
    """Write a checkpoint with its tokenizer; return the folder."""
    tiny_mole(seed, **changes).to(getattr(torch, dtype)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
