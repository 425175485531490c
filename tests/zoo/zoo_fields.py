"""Fields that the configurations of several model types share, shrunk."""

from typing import Any

Fields = dict[str, Any]

N_LAYERS = 4
FULL, NEAR, LINEAR = "full_attention", "sliding_attention", "linear_attention"
BASE: Fields = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "tie_word_embeddings": False,
}
# Groups of fields that several types share.
LATENT: Fields = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
ROUTED: Fields = {"n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 40}
LOCAL: Fields = {"num_local_experts": 8}
EXPERTS: Fields = {"num_experts": 8, "moe_intermediate_size": 40, "head_dim": 16}
SHARED: Fields = {**EXPERTS, "shared_expert_intermediate_size": 56}
INDEXED: Fields = {"index_topk": 6, "index_head_dim": 16, "index_n_heads": 2}
ONE_GROUP: Fields = {"n_group": 1, "topk_group": 1}
GROUPS: Fields = {"n_group": 4, "topk_group": 2}
DENSE_FIRST: Fields = {"mlp_layer_types": ["dense", *["sparse"] * (N_LAYERS - 1)]}
WINDOWS: Fields = {"layer_types": [FULL, NEAR, NEAR, FULL], "sliding_window": 8}
DELTA: Fields = {
    "layer_types": [LINEAR, LINEAR, LINEAR, FULL],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
SMALL_LINEAR: Fields = {
    "layer_types": [LINEAR, LINEAR, LINEAR, FULL],
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "linear_conv_kernel_dim": 4,
}
MAMBA: Fields = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
NEMOTRON: Fields = {
    **ROUTED,
    "moe_shared_expert_intermediate_size": 48,
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "chunk_size": 32,
    "use_mamba_kernels": False,
    "layers_block_type": [LINEAR, "moe", FULL, "moe"],
}
INKLING: Fields = {
    **ROUTED,
    "head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window_size": 8,
    "d_rel": 4,
    "rel_extent": 32,
    "layer_types": [*["hybrid_sliding"] * 3, "hybrid"],
}
V4: Fields = {
    **ROUTED,
    **INDEXED,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "q_lora_rank": 24,
    "o_lora_rank": 16,
    "o_groups": 2,
    "hc_mult": 4,
    "sliding_window": 8,
    "partial_rotary_factor": 0.25,
    "qk_rope_head_dim": 8,
    "layer_types": [
        *["heavily_compressed_attention"] * 2,
        "compressed_sparse_attention",
        "heavily_compressed_attention",
    ],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
}
QWEN4: Fields = {
    **SHARED,
    **DELTA,
    "layer_types": [LINEAR, LINEAR, LINEAR, "indexed_attention"],
    "hc_count": 2,
    "hc_lowrank": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 500,
    "ple_embed_dim": 16,
    "split_ngram_parts": 4,
    "heads_per_ngram": 2,
}
GEMMA: Fields = {
    **EXPERTS,
    "enable_moe_block": True,
    "top_k_experts": 2,
    "layer_types": [NEAR, NEAR, NEAR, FULL],
    "sliding_window": 8,
    "vocab_size_per_layer_input": 260,
    "hidden_size_per_layer_input": 16,
    "tie_word_embeddings": True,
    "per_layer_config": {"03": {"head_dim": 32}},
}
GPT_OSS: Fields = {**LOCAL, **WINDOWS, "head_dim": 16}
LFM2: Fields = {
    **EXPERTS,
    "num_dense_layers": 1,
    "layer_types": ["conv", "conv", FULL, "conv"],
    "tie_word_embeddings": True,
}
NOTE: Fields = {
    **LATENT,
    **ROUTED,
    **INDEXED,
    **ONE_GROUP,
    **DENSE_FIRST,
    "layer_types": ["indexed_attention", NEAR, "indexed_attention", NEAR],
    "sliding_window": 8,
    "shared_experts_intermediate_size": 48,
    "head_dim": 24,
    "per_layer_config": {},
}
M3: Fields = {
    **LOCAL,
    **DENSE_FIRST,
    "head_dim": 16,
    "intermediate_size": 48,
    "dense_intermediate_size": 96,
    "shared_intermediate_size": 48,
    "rotary_dim": 8,
    "layer_types": [FULL] * N_LAYERS,
}
LLAMA4: Fields = {
    **LOCAL,
    "num_experts_per_tok": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "intermediate_size_mlp": 96,
    "interleave_moe_layer_step": 2,
    "moe_layers": [1, 3],
    "no_rope_layers": [1, 1, 1, 0],
    "attention_chunk_size": 32,
    "layer_types": [*["chunked_attention"] * 3, FULL],
}
MISTRAL4: Fields = {**LATENT, **ROUTED, **ONE_GROUP, "head_dim": 24, "first_k_dense_replace": 0}
ARIA: Fields = {
    "moe_num_experts": 8,
    "moe_topk": 2,
    "moe_num_shared_experts": 2,
    "head_dim": 16,
    "intermediate_size": 48,
}
PARTIAL_ROPE: Fields = {
    "rope_type": "default",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "mrope_section": [2, 1, 1],
}
M_ROPE: Fields = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    }
}
EYE: Fields = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_heads": 4,
    "depth": 1,
    "out_hidden_size": 64,
}
SAM: Fields = {
    **EYE,
    "output_channels": 16,
    "image_size": 64,
    "patch_size": 16,
    "window_size": 2,
    "global_attn_indexes": [0],
    "mlp_dim": 48,
    "downsample_channels": [24, 32],
}
ENCODER: Fields = {**EYE, "num_key_value_heads": 4, "vocab_size": 64}
NO_INNER = frozenset({"intermediate_size"})
NO_LAYERS = frozenset({"num_hidden_layers"})
VISION: Fields = {"vision_config": EYE}
