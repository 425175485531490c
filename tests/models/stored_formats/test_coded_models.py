"""Whole quantized models pack and run: token for token what transformers says of the same weights
in float32."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from moe_tool.errors import CorruptArtifactError
from moe_tool.formats.safetensors_index import Checkpoint, read_header
from moe_tool.models.architecture import check_headers
from moe_tool.models.locate import LocatedModel
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import generate_ids
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from tests.models.stored_formats import coded_weights as make
from tests.models.stored_formats.coded_weights import Coded, Floats, Tensors
from tests.models.stored_formats.test_awq import AWQ, awq
from tests.models.stored_formats.test_bitsandbytes import BNB, four_bits, int8
from tests.models.stored_formats.test_gptq import GPTQ, gptq
from tests.models.stored_formats.test_mlx import MLX, mlx
from tests.packed import pack_bundle
from tests.tiny_models import tiny_tokenizer

PROMPT = [256, 84, 104, 101, 32, 108, 105, 115, 116]
N_TOKENS = 16
_SHAPE = {
    "vocab_size": 260,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "tie_word_embeddings": False,
}
LINEAR = re.compile(r"_proj(_with_mqa)?\.weight$")


def deepseek_v3() -> PreTrainedConfig:
    """Its kv_a_proj_with_mqa has the 576 rows of the real one: four blocks and a half."""
    attention = {"kv_lora_rank": 512, "q_lora_rank": 24, "qk_rope_head_dim": 64}
    heads = {"qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4}
    experts = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 40}
    kept = {key: value for key, value in _SHAPE.items() if key != "head_dim"}
    return DeepseekV3Config(
        **{**kept, **attention, **heads, **experts}, intermediate_size=96, first_k_dense_replace=1
    )


def qwen3_moe() -> PreTrainedConfig:
    return Qwen3MoeConfig(
        **_SHAPE, intermediate_size=96, moe_intermediate_size=32, num_experts=8, norm_topk_prob=True
    )


def gpt_oss() -> PreTrainedConfig:
    return GptOssConfig(
        **_SHAPE,
        intermediate_size=32,
        num_local_experts=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )


Encode = Callable[[np.random.Generator, int, int], Coded]


def code_matrices(weights: dict[str, Floats], encode: Encode) -> tuple[Tensors, dict[str, Floats]]:
    """Return codes and weights of every matrix of experts and attention."""
    rng, coded, plain = np.random.default_rng(11), {}, {}
    for name, values in weights.items():
        if LINEAR.search(name):
            made = encode(rng, *values.shape)
            plain[name] = made.weights
            for ending, tensor in made.tensors.items():
                coded[f"{name.removesuffix('weight')}{ending}"] = tensor
    return coded, plain


def code_stacks(weights: dict[str, Floats], _: Encode | None) -> tuple[Tensors, dict[str, Floats]]:
    """Return codes and weights of gpt-oss's experts."""
    rng, coded, plain = np.random.default_rng(11), {}, {}
    for name, values in weights.items():
        if re.search(r"experts\.(gate_up|down)_proj$", name):
            experts, n_in, n_out = values.shape
            made = make.stacked_mxfp4(rng, experts, n_out, n_in)
            plain[name] = made.weights
            coded |= {name + ending: tensor for ending, tensor in made.tensors.items()}
    return coded, plain


Model = tuple[Callable[[], PreTrainedConfig], Any, Encode | None]
"""Configuration, quantization settings, and the coder of a matrix; None: stacks of MXFP4"""
MODELS: dict[str, Model] = {
    "fp8": (deepseek_v3, make.FP8_BLOCKS, make.fp8),
    "mxfp4": (gpt_oss, make.MXFP4, None),
    "int4": (qwen3_moe, make.INT4, make.packed_integers),
    "nvfp4": (qwen3_moe, make.MODELOPT, make.modelopt_nvfp4),
    "gptq": (qwen3_moe, GPTQ, gptq),
    "mlx": (qwen3_moe, MLX, mlx),
    "nf4": (qwen3_moe, BNB, partial(four_bits, is_nested=True)),
    "int8": (qwen3_moe, {"quant_method": "bitsandbytes", "load_in_8bit": True}, int8),
    "awq": (qwen3_moe, AWQ, awq),
}


def write_pair(name: str, folder: Path) -> tuple[Path, Path]:
    """Write a coded checkpoint, and the one in float32 that it stands for."""
    return write_model(MODELS[name], folder)


def write_model(model_of: Model, folder: Path) -> tuple[Path, Path]:
    """Write a checkpoint of a tiny random model, coded and in float32."""
    configure, settings, encode = model_of
    plain_folder, coded_folder = folder / "plain", folder / "coded"
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(configure(), dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.2)
            weight.copy_(weight.bfloat16())
    model.generation_config.eos_token_id = None
    model.save_pretrained(plain_folder)
    weights = {key: t.numpy() for key, t in load_file(plain_folder / "model.safetensors").items()}
    coded, plain = (code_matrices if encode else code_stacks)(weights, encode)  # type: ignore[arg-type]
    assert len(plain) > 3
    save_file(
        {key: torch.from_numpy(plain.get(key, value).copy()) for key, value in weights.items()},
        plain_folder / "model.safetensors",
        {"format": "pt"},
    )
    rest = {key: torch.from_numpy(w).bfloat16() for key, w in weights.items() if key not in plain}
    coded_folder.mkdir()
    save_file(coded | rest, coded_folder / "model.safetensors", {"format": "pt"})
    config = json.loads((plain_folder / "config.json").read_text())
    key = "quantization_config" if "quant_method" in settings else "quantization"
    config[key] = settings
    (coded_folder / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().save_pretrained(coded_folder)
    return coded_folder, plain_folder


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_the_plain_model(name: str, tmp_path: Path) -> None:
    coded, plain = write_pair(name, tmp_path)
    run_beside(coded, plain, tmp_path)


def run_beside(coded: Path, plain: Path, folder: Path) -> None:
    """Check that a packed model makes the tokens of a plain one in transformers."""
    report = pack_bundle(LocatedModel(folder=coded, name="m"), out=folder / "bundle", bits="native")
    options = run_options(memory="min", context=64, prompt_tokens=32)
    with open_session(report.bundle, options) as session:
        generate = GenerateOptions(max_tokens=N_TOKENS, ignore_eos=True)
        made = generate_ids(session, [PROMPT], generate).token_ids[0]
    model = AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.inference_mode():
        ids = torch.tensor([PROMPT])
        wanted = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=N_TOKENS,
            do_sample=False,
        )
    assert list(made) == wanted[0, len(PROMPT) :].tolist()
    assert len(set(made)) > 3


def test_headers_on_the_hub_are_checked_only_where_they_tell_shapes(tmp_path: Path) -> None:
    for name in ("nf4", "gptq"):
        coded, _ = write_pair(name, tmp_path / name)
        raw = read_header(coded / "model.safetensors")
        away = {key: replace(info, file=tmp_path / "away") for key, info in raw.items()}
        check_headers(coded, Checkpoint(away))
        lacking = {key: info for key, info in away.items() if "lm_head" not in key}
        if name == "gptq":
            with pytest.raises(CorruptArtifactError, match="lacks a tensor"):
                check_headers(coded, Checkpoint(lacking))
