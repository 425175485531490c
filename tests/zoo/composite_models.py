"""Tiny configurations of model types that see or hear, of which the text part is used."""

from tests.zoo.zoo_fields import (
    ARIA,
    DELTA,
    DENSE_FIRST,
    ENCODER,
    EXPERTS,
    EYE,
    FULL,
    GEMMA,
    INDEXED,
    INKLING,
    LATENT,
    LFM2,
    LINEAR,
    LLAMA4,
    LOCAL,
    M3,
    M_ROPE,
    MISTRAL4,
    N_LAYERS,
    NEAR,
    NEMOTRON,
    NO_INNER,
    NO_LAYERS,
    NOTE,
    ONE_GROUP,
    PARTIAL_ROPE,
    QWEN4,
    ROUTED,
    SAM,
    SHARED,
    SMALL_LINEAR,
    VISION,
    WINDOWS,
)
from tests.zoo.zoo_kind import Kind, shrunk

COMPOSITE_MODELS: dict[str, Kind] = {
    "aria": shrunk(ARIA, parts=VISION),
    "deepseek_ocr2": shrunk(
        ROUTED,
        ONE_GROUP,
        DENSE_FIRST,
        head_dim=16,
        num_key_value_heads=4,
        parts={
            "vision_config": {
                "sam_config": SAM,
                "encoder_config": ENCODER | {"layer_types": [FULL]},
            }
        },
    ),
    "unlimited_ocr": shrunk(
        ROUTED,
        DENSE_FIRST,
        head_dim=16,
        num_key_value_heads=4,
        layer_types=["reference_sliding_attention"] * N_LAYERS,
        parts={"vision_config": {"sam_config": SAM, "encoder_config": EYE | {"image_size": 64}}},
    ),
    "dots3_note": shrunk(
        NOTE,
        parts={
            "vision_config": EYE
            | {
                "mlp_layer_types": ["sparse"],
                "moe_intermediate_size": 32,
                "num_local_experts": 4,
                "adapter_in_dim": 32,
                "adapter_out_dim": 64,
                "per_layer_config": {},
            },
            "audio_config": EYE
            | {
                "num_key_value_heads": 4,
                "head_dim": 8,
                "adapter_input_size": 32,
                "adapter_out_dim": 64,
                "downsample_hidden_size": 16,
            },
        },
    ),
    "gemma4": shrunk(GEMMA, parts={}),
    "glm4v_moe": shrunk(
        ROUTED,
        ONE_GROUP,
        head_dim=16,
        first_k_dense_replace=1,
        rope_parameters=PARTIAL_ROPE,
        parts=VISION,
    ),
    "glm5_next": shrunk(
        LATENT,
        ROUTED,
        INDEXED,
        SMALL_LINEAR,
        DENSE_FIRST,
        qk_rope_head_dim=0,
        head_dim=0,
        layer_types=[LINEAR, LINEAR, LINEAR, "indexed_attention"],
        hc_mult=2,
        index_kpool=2,
        parts={"vision_config": EYE | {"projection_intermediate_size": 48}},
        streams=False,
    ),
    "inkling2": shrunk(
        INKLING,
        n_layers_per_attn_res_block=2,
        unpadded_vocab_size=260,
        without=NO_INNER,
        parts={"vision_config": EYE | {"text_hidden_size": 64, "projection_hidden_dim": 32}},
        streams=False,
    ),
    "inkling_mm_model": shrunk(
        INKLING,
        DENSE_FIRST,
        n_shared_experts=2,
        parts={
            "vision_config": EYE | {"text_hidden_size": 64, "n_layers": 2},
            "audio_config": {"text_hidden_size": 64},
        },
    ),
    "internvl": shrunk(
        EXPERTS,
        text_type="qwen3_moe",
        parts={"vision_config": EYE | {"image_size": [32, 32], "patch_size": [16, 16]}},
    ),
    "kimi_k25": shrunk(
        LATENT, ROUTED, ONE_GROUP, first_k_dense_replace=1, parts=VISION, represents=True
    ),
    "lfm2_vl": shrunk(LFM2, text_type="lfm2_moe", parts=VISION),
    "llama4": shrunk(
        LLAMA4,
        parts={
            "vision_config": EYE
            | {
                "image_size": 56,
                "patch_size": 14,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            }
        },
    ),
    "minimax_m3_vl": shrunk(M3, parts=VISION),
    "mistral3": shrunk(
        MISTRAL4,
        text_type="mistral4",
        parts={"vision_config": EYE | {"model_type": "pixtral", "head_dim": 8}},
    ),
    "mistral_large4": shrunk(MISTRAL4, first_k_dense_replace=1, parts=VISION),
    "muse_spark": shrunk(
        LOCAL,
        EXPERTS,
        moe_hidden_size=32,
        sliding_window=8,
        layer_types=[NEAR, FULL, NEAR, NEAR],
        layer_rope_theta=[5e5, 0, 5e5, 5e5],
        mlp_layer_types=["sparse"] * N_LAYERS,
        parts={
            **VISION,
            "out_hidden_size": 64,
            "projector_hidden_size": 32,
            "audio_config": {
                "patch_sizes": [16, 6],
                "hidden_sizes": [16, 32],
                "depths": [1, 1],
                "num_hidden_layers": 2,
                "out_hidden_size": 64,
            },
        },
        represents=True,
    ),
    "nemotron_h_omni": shrunk(
        NEMOTRON,
        without=NO_LAYERS,
        parts={
            "vision_config": EYE
            | {"image_size": 32, "max_img_size": 64, "video_temporal_patch_size": 2}
        },
    ),
    "qwen3_omni_moe_thinker": shrunk(
        EXPERTS,
        M_ROPE,
        parts={
            "vision_start_token_id": 250,
            "vision_end_token_id": 251,
            "audio_start_token_id": 252,
            "audio_end_token_id": 253,
            "vision_config": EYE | {"deepstack_visual_indexes": [0]},
            "audio_config": {
                "encoder_layers": 1,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 48,
                "d_model": 32,
                "output_dim": 64,
            },
        },
    ),
    "qwen3_vl_moe": shrunk(
        EXPERTS,
        LOCAL,
        M_ROPE,
        parts={"vision_config": EYE | {"deepstack_visual_indexes": [0]}},
        represents=True,
    ),
    "qwen3_5_moe": shrunk(
        SHARED,
        DELTA,
        without=NO_INNER,
        parts=VISION,
        rope_parameters=PARTIAL_ROPE
        | {"partial_rotary_factor": 0.25, "mrope_section": [1, 1, 0], "mrope_interleaved": True},
    ),
    "qwen4_exp": shrunk(QWEN4, without=NO_INNER, parts=VISION),
    "step3p7": shrunk(
        ROUTED,
        WINDOWS,
        DENSE_FIRST,
        head_dim=16,
        share_expert_dim=48,
        num_sliding_attention_heads=8,
        rope_parameters={
            each: {"rope_type": "default", "rope_theta": 1e4} for each in (FULL, NEAR)
        },
        parts=VISION,
        represents=True,
    ),
}
"""Name -> the smallest model that has everything of its type"""
