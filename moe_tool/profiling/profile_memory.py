"""How a profile divides its memory budget: the layer at hand, hidden states, one batch, one block
of the probe."""

from dataclasses import dataclass

from moe_tool.available_memory import (
    anonymous_rss_bytes,
    available_memory_bytes,
    current_rss_bytes,
)
from moe_tool.budget.refusal import TEXT_SLACK_BYTES, name_lines, require_budget, sum_lines
from moe_tool.models.architecture import OpenedModel
from moe_tool.models.layer_experts import layer_experts_bytes

DEFAULT_SHARE = 0.8
"""Share of what is free"""
_HIDDEN_SHARE = 0.25
_MARGIN_BYTES = 96 * 2**20
"""Allocator slack and library pages first touched in the pass"""
_BATCH_TOKENS = 4096
"""Past this a larger batch buys nothing: matrix products are at full speed"""
LOGIT_ROWS = 16
"""Tokens whose logits are in memory at once when sensitivities are computed"""
_LOGIT_COPIES = 4
"""Exact, disturbed, and what the head and a row in float64 take beside them"""
_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileMemory:
    """The division."""

    memory_bytes: int
    hidden_in_memory: bool
    batch_sequences: int
    probe_bytes: int
    """Room for one block of all experts' outputs"""


def plan_profile_memory(
    opened: OpenedModel, *, n_rows: int, width: int, n_tokens: int, seq_len: int, asked: int | None
) -> ProfileMemory:
    """Return how the budget is divided.

    Args:
        opened: the checkpoint; its non-layer tensors are counted as loaded already.
        n_rows: rows of hidden states.
        width: W, numbers in such a row.
        n_tokens: T, rows of a layer's trace.
        seq_len: S; a batch holds at least one sequence.
        asked: the budget in bytes; None: DEFAULT_SHARE of what the process can reach.

    Raises:
        BudgetError: one layer, one sequence and the trace do not fit.
    """
    used = current_rss_bytes()
    reachable = anonymous_rss_bytes() + available_memory_bytes()
    budget = asked if asked is not None else int(DEFAULT_SHARE * reachable)
    # Masks of a sequence, and its score matrices where no fused attention takes them.
    score_bytes = 4 * (2 + 3 * opened.unfused_attention_heads) * seq_len * seq_len
    per_sequence = seq_len * _bytes_per_token(opened, width) + score_bytes
    shape = opened.shape
    pass_lines = {
        "one layer": _layer_bytes(opened),
        # Index, weight, logits, scores and next gates, and once more while they are written.
        "trace": 2 * n_tokens * (4 * shape.experts + 10 * shape.top_k),
        "one sequence": per_sequence,
    }
    logits = {"logits at the end": LOGIT_ROWS * shape.vocabulary * _LOGIT_COPIES * 4}
    # The logits are computed once the last layer is let go of.
    largest = max(pass_lines, logits, key=lambda parts: sum(parts.values()))
    lines = name_lines({"process": used, **largest, "margin": _MARGIN_BYTES})
    require_budget(f"profiling {opened.identity.name}", budget, lines, slack_bytes=TEXT_SLACK_BYTES)
    hidden = n_rows * width * 4
    room = budget - sum_lines(lines)
    in_memory = hidden <= min(_HIDDEN_SHARE * budget, room)
    if in_memory:
        room -= hidden
    most = max(1, _BATCH_TOKENS // seq_len)
    batch = min(most, 1 + (room // 2) // per_sequence)
    return ProfileMemory(
        memory_bytes=budget,
        hidden_in_memory=in_memory,
        batch_sequences=int(batch),
        probe_bytes=int(min(max(room // 4, 16 * _MIB), 512 * _MIB)),
    )


def _layer_bytes(opened: OpenedModel) -> int:
    """Return the bytes of all experts of a layer as stored, of two of their matrices in float32
    while they are priced, of the rest in float32, and of a tensor as it is decoded.

    Tables of which only rows are read are no part of a layer."""
    shape = opened.shape
    stored = layer_experts_bytes(opened.experts, shape)
    largest = max(tensor.n_weights for tensor in shape.expert_tensors)
    skeleton = 4 * opened.skeleton.n_loaded // shape.n_decoder_layers
    return stored + 4 * 4 * largest + skeleton + opened.decode_bytes


def _bytes_per_token(opened: OpenedModel, width: int) -> int:
    """Activations of one token in one layer, float32: attention, all slots' inner and outer
    products, the copies between."""
    shape = opened.shape
    inner = max(tensor.shape[0] for tensor in shape.expert_tensors)
    return 4 * (16 * width + shape.top_k * (2 * inner + 3 * shape.hidden) + 4 * shape.experts)
