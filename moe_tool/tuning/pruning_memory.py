"""Memory of training a bundle's mask routers, beside that of the session."""

from typing import Any

from moe_tool.artifacts.mask_router import mask_router_shapes
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.models.architecture import UNFUSED_ATTENTION
from moe_tool.runtime.working_set import attention_floats

_FLOAT_BYTES = 4
_HIDDEN_COPIES = 14
"""[T, H] tensors that a decoder layer keeps for the backward: residuals, inputs of norms and
activations, outputs of experts and attention, and their slices"""
_LOGIT_COPIES = 7
"""[T, V] tensors alive at once in the loss: both models' logits, their log-probabilities, the
terms of the divergence, and its gradients"""
_EXPERT_COPIES = 4
"""Copies of an expert in float32 in the backward: its matrices, and temporaries of the largest"""
_ROUTER_COPIES = 8
"""Copies of the routers: parameters, gradients, both moments, and these once more while saving"""


def training_bytes(config: Any, shape: MoeShape, *, batch: int, seq_len: int) -> int:
    """Return the peak memory of forward and backward of `batch` sequences of `seq_len` tokens, with
    the routers' state."""
    n_tokens = batch * seq_len
    per_layer = _HIDDEN_COPIES * shape.hidden + 4 * attention_floats(config)
    per_layer += 4 * shape.experts + 16 * shape.top_k
    if config.model_type in UNFUSED_ATTENTION:
        per_layer += 3 * int(config.num_attention_heads) * seq_len
    inner = 6 * max(tensor.shape[0] for tensor in shape.expert_tensors)
    inner += 3 * int(getattr(config, "intermediate_size", 0) or 0)
    kept = n_tokens * (shape.n_decoder_layers * per_layer + _LOGIT_COPIES * shape.vocabulary)
    rows = mask_router_shapes(shape)
    router = sum(extents[0] * (extents[1] if len(extents) > 1 else 1) for extents in rows.values())
    expert = _EXPERT_COPIES * shape.n_expert_weights
    return _FLOAT_BYTES * (
        kept
        + n_tokens * shape.top_k * (inner + 4 * shape.hidden)
        + expert
        + _ROUTER_COPIES * len(shape.layers) * router
    )


def verdict_bytes(shape: MoeShape, *, n_tokens: int) -> int:
    """Return the memory of `n_tokens` held-out tokens: all slot scores, twice, and the tables of
    thresholds."""
    return 8 * _FLOAT_BYTES * n_tokens * len(shape.layers) * shape.top_k
