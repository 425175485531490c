"""Memory of a model's forward passes beside its weights, computed from its configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.budget.account import MARGIN_BYTES
from moe_tool.budget.refusal import MemoryLine, name_lines
from moe_tool.models.architecture import UNFUSED_ATTENTION
from moe_tool.models.context_length import context_length

PREFILL_CHUNK_TOKENS = 256
"""Prompt tokens per forward, all sequences of a batch together: longer chunks read fewer experts
twice, but take room."""
_FLOAT_BYTES = 4
_HIDDEN_COPIES = 12
"""[T, H] tensors alive at once in a decoder layer: residual, normed, attention in and out, expert
in, out, sum"""
_LOGIT_COPIES = 10
"""[B, V] tensors alive at once while a token is chosen: logits, scores, probabilities, sorted
values and indices"""
_ROW_BLOCK_BYTES = 16 * 2**20
"""Scratch for expanding quantized or narrow weights, and the matrix library's own buffers"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Largest request that a session is opened for."""

    batch: int
    """B: sequences at once"""
    positions: int
    """Prompt and generated tokens of one sequence"""
    prompt_tokens: int
    """Prompt tokens of one sequence, at most `positions`"""
    keeps_scores: bool = False
    """True where a prompt's attention is computed step by step, with its score matrices"""


def positions_within(config: Any, context: int) -> int:
    """Return `context`, the wanted positions of one sequence, capped at the model's maximum."""
    return min(context, context_length(config) or context)


def run_lines(
    config: Any,
    shape: MoeShape,
    workload: Workload,
    *,
    process_bytes: int,
    skeleton_bytes: int,
    beside: Mapping[str, int],
) -> tuple[MemoryLine, ...]:
    """Return the account of a run without its expert slots.

    Args:
        config: transformers' configuration of the text model.
        shape: the model's experts.
        workload: largest request of the session.
        process_bytes: size of the process without the skeleton.
        skeleton_bytes: size of the loaded skeleton.
        beside: sizes of everything else by name; zeros are left out.
    """
    cache = f"KV cache, {workload.positions} positions x {workload.batch}"
    return name_lines(
        {
            "process and its libraries": process_bytes,
            "skeleton": skeleton_bytes,
            cache: kv_cache_bytes(config, workload),
            "working buffers": buffer_bytes(config, shape, workload),
            "margin": MARGIN_BYTES,
            **beside,
        }
    )


def prefill_chunk(workload: Workload) -> int:
    """Return the prompt tokens per sequence in one forward."""
    share = max(16, PREFILL_CHUNK_TOKENS // workload.batch)
    return max(1, min(share, workload.prompt_tokens))


def kv_cache_bytes(config: Any, workload: Workload) -> int:
    """Return the float32 KV cache at its largest, its growth included.

    A cache that transformers makes itself, and any layer with a window, grows by concatenation, one
    layer at a time: while a token is appended, the old and the new keys (or values) of a layer
    exist together. Sliding windows are counted at full length.
    """
    floats = [_kv_floats(layer) for layer in _layer_configs(config)]
    return workload.batch * workload.positions * (sum(floats) + max(floats)) * _FLOAT_BYTES


def buffer_bytes(config: Any, shape: MoeShape, workload: Workload) -> int:
    """Return the peak memory of one forward beside weights and KV cache, in bytes."""
    n_tokens = workload.batch * prefill_chunk(workload)
    per_token = _HIDDEN_COPIES * shape.hidden + 3 * attention_floats(config)
    per_token += max(_expert_floats(shape), 3 * int(getattr(config, "intermediate_size", 0) or 0))
    per_token += 2 * shape.top_k * shape.hidden + 8 * shape.experts
    activations = n_tokens * per_token * _FLOAT_BYTES
    mask = n_tokens * workload.positions * 3 * _FLOAT_BYTES
    n_logits = workload.batch * shape.vocabulary * _LOGIT_COPIES
    return (
        activations
        + mask
        + _attention_scratch_bytes(config, workload)
        + n_logits * _FLOAT_BYTES
        + _ROW_BLOCK_BYTES
    )


def _attention_scratch_bytes(config: Any, workload: Workload) -> int:
    """Size of one layer's keys and values for every query head, and of the scores if kept."""
    most = 0
    for layer in _layer_configs(config):
        n_floats = _expanded_floats(layer) if _expanded_floats(layer) > _kv_floats(layer) else 0
        if workload.keeps_scores or config.model_type in UNFUSED_ATTENTION:
            n_floats += 3 * int(layer.num_attention_heads) * prefill_chunk(workload)
        most = max(most, n_floats)
    return workload.batch * workload.positions * most * _FLOAT_BYTES


def _layer_configs(config: Any) -> list[Any]:
    """Return one configuration per decoder layer: in some models attention differs by layer."""
    if getattr(config, "is_heterogeneous", False):
        return list(config.per_layer_config)
    return [config] * int(config.num_hidden_layers)


def _kv_floats(config: Any) -> int:
    """Scalars per position in one layer's cache: keys and values, or their latent vector."""
    if getattr(config, "kv_lora_rank", None):
        return int(config.kv_lora_rank + config.qk_rope_head_dim)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    return 2 * kv_heads * _head_dim(config)


def _expanded_floats(config: Any) -> int:
    """Scalars per position in keys and values for every query head."""
    heads = int(config.num_attention_heads)
    if getattr(config, "kv_lora_rank", None):
        return heads * (_latent_head_dim(config) + int(config.v_head_dim))
    return 2 * heads * _head_dim(config)


def attention_floats(config: Any) -> int:
    """Return the scalars per token of queries, keys and values together, of the widest layer."""
    return max(_attention_floats(layer) for layer in _layer_configs(config))


def _attention_floats(config: Any) -> int:
    heads = int(config.num_attention_heads)
    if getattr(config, "kv_lora_rank", None):
        return heads * _latent_head_dim(config) + _expanded_floats(config)
    return heads * _head_dim(config) + _kv_floats(config)


def _head_dim(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _latent_head_dim(config: Any) -> int:
    """Width of a query or key in attention with latent keys (DeepSeek)."""
    return int(config.qk_nope_head_dim + config.qk_rope_head_dim)


def _expert_floats(shape: MoeShape) -> int:
    """Scalars per token inside an expert: gate and up, the activated gate, and their product."""
    return 2 * max(tensor.shape[0] for tensor in shape.expert_tensors)
