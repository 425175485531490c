"""Tiny random checkpoints of every tested architecture, as irregular as the real ones."""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    HunYuanMoEV1Config,
    MiniMaxM2Config,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    logging,
)

VOCABULARY = 260
"""256 bytes, <bos>, <eos>, <pad> and one id that is never used."""
N_LAYERS = 3

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
}


def _mixtral() -> PreTrainedConfig:
    return MixtralConfig(**_COMMON, intermediate_size=48, num_local_experts=8)


def _qwen2_moe() -> PreTrainedConfig:
    return Qwen2MoeConfig(
        **_COMMON,
        intermediate_size=96,
        moe_intermediate_size=40,
        shared_expert_intermediate_size=56,
        num_experts=6,
        norm_topk_prob=False,
    )


def _qwen3_moe() -> PreTrainedConfig:
    return Qwen3MoeConfig(
        **{**_COMMON, "num_experts_per_tok": 3},
        head_dim=16,
        intermediate_size=96,
        moe_intermediate_size=40,
        num_experts=10,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    )


def _olmoe() -> PreTrainedConfig:
    return OlmoeConfig(**_COMMON, intermediate_size=40, num_experts=8, norm_topk_prob=False)


def _phimoe() -> PreTrainedConfig:
    return PhimoeConfig(
        **_COMMON,
        intermediate_size=48,
        num_local_experts=8,
        router_jitter_noise=0.3,
        attention_bias=True,
        lm_head_bias=True,
    )


def _granitemoe() -> PreTrainedConfig:
    return GraniteMoeConfig(
        **_COMMON,
        intermediate_size=48,
        num_local_experts=8,
        tie_word_embeddings=True,
        embedding_multiplier=3.0,
        logits_scaling=1.5,
        residual_multiplier=0.7,
        attention_multiplier=0.2,
    )


def _deepseek_v2() -> PreTrainedConfig:
    return DeepseekV2Config(
        **{**_COMMON, **_LATENT_ATTENTION},
        intermediate_size=96,
        moe_intermediate_size=40,
        first_k_dense_replace=1,
        n_routed_experts=8,
        n_shared_experts=2,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.7,
    )


def _deepseek_v3() -> PreTrainedConfig:
    return DeepseekV3Config(
        **{**_COMMON, **_LATENT_ATTENTION},
        intermediate_size=96,
        moe_intermediate_size=40,
        first_k_dense_replace=1,
        n_routed_experts=8,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )


def _glm4_moe() -> PreTrainedConfig:
    return Glm4MoeConfig(
        **_COMMON,
        head_dim=16,
        intermediate_size=96,
        moe_intermediate_size=40,
        first_k_dense_replace=1,
        n_routed_experts=8,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        use_qk_norm=True,
    )


def _ernie4_5_moe() -> PreTrainedConfig:
    kept = {key: value for key, value in _COMMON.items() if key != "num_experts_per_tok"}
    return Ernie4_5_MoeConfig(
        **kept,
        intermediate_size=96,
        moe_intermediate_size=40,
        moe_num_experts=8,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        moe_layer_end_index=2,
        tie_word_embeddings=True,
    )


def _minimax_m2() -> PreTrainedConfig:
    return MiniMaxM2Config(**_COMMON, head_dim=16, intermediate_size=40, num_local_experts=8)


def _hunyuan_v1_moe() -> PreTrainedConfig:
    kept = {key: value for key, value in _COMMON.items() if key != "num_experts_per_tok"}
    return HunYuanMoEV1Config(
        **kept, head_dim=16, intermediate_size=48, num_experts=8, moe_topk=2, eod_token_id=257
    )


def _gpt_oss() -> PreTrainedConfig:
    return GptOssConfig(
        **_COMMON,
        head_dim=16,
        intermediate_size=48,
        num_local_experts=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
            "rope_theta": 150000.0,
        },
    )


TINY: dict[str, Callable[[], PreTrainedConfig]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "phimoe": _phimoe,
    "granitemoe": _granitemoe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "glm4_moe": _glm4_moe,
    "ernie4_5_moe": _ernie4_5_moe,
    "minimax_m2": _minimax_m2,
    "hunyuan_v1_moe": _hunyuan_v1_moe,
    "gpt_oss": _gpt_oss,
}
"""Architecture to its tiny configuration; hidden 64 and 3 decoder layers everywhere."""


def make_tiny_checkpoint(
    arch: str, folder: Path, seed: int = 0, dtype: str = "float32", max_shard_size: str = "50GB"
) -> Path:
    """Write a random checkpoint and its tokenizer as `save_pretrained` does; return the folder."""
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_config(TINY[arch](), dtype=torch.float32)
    _fill(model, seed)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per byte and three special ones, VOCABULARY - 1 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def _fill(model: PreTrainedModel, seed: int) -> None:
    """Draw every tensor so that each matters: no bias is zero, no norm is one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [(name, tensor) for name, tensor in model.named_parameters()]
    stored = model.state_dict()
    tensors += [(name, tensor) for name, tensor in model.named_buffers() if name in stored]
    with torch.no_grad():
        for name, tensor in tensors:
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name:
                tensor.copy_(1 + 0.1 * noise)
            elif "correction_bias" in name:
                tensor.copy_(0.1 * noise)
            elif tensor.ndim < 2 or name.endswith("_bias"):
                tensor.copy_(0.3 * noise)
            else:
                tensor.copy_(1.5 * noise / tensor.shape[-1] ** 0.5)
