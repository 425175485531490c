"""Tiny models that consist of one large embedding table, all but."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.tiny_models import tiny_tokenizer
from tests.zoo.text_models import TEXT_MODELS

TABLE = "model.embed_tokens_per_layer.weight"


def make_table_model(folder: Path, *, n_rows: int, width: int) -> Path:
    """Write a bfloat16 model of Gemma 4's kind whose table per layer is [n_rows, 4 * width]."""
    config = TEXT_MODELS["gemma4_text"].config("gemma4_text")
    assert config.num_hidden_layers == 4
    config.vocab_size_per_layer_input = n_rows
    config.hidden_size_per_layer_input = width
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
