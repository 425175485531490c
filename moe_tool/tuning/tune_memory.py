"""Memory that tuning takes, before it begins: one layer, exact or as codes that move."""

from moe_tool.artifacts.moe_shape import FLOAT_SIZE_BYTES
from moe_tool.available_memory import current_rss_bytes
from moe_tool.budget.refusal import name_lines, require_budget
from moe_tool.models.architecture import OpenedModel
from moe_tool.tuning.paired_layers import BATCH_TOKENS

_MARGIN_BYTES = 160 * 2**20
"""Allocator slack, libraries first touched, file pages under way to the disk"""
_HIDDEN_COPIES = 8
"""Tensors [T, H] in float32 at once: both streams, the bundle's without its experts, what experts
are given batch by batch, the same in one piece, the target, and what two of these are made from"""
_WORKING_COPIES = 6
"""Copies of the largest matrix in float32: weights, slopes, gradient, what is wanted, what is
lost"""


def require_tune_memory(
    opened: OpenedModel,
    *,
    tokens: int,
    batch: int,
    record_bytes: int,
    state_bytes: int,
    asked: int | None,
) -> int:
    """Return what tuning will take, the whole process.

    Args:
        opened: the checkpoint.
        tokens: that go through the layers.
        batch: tokens of a step.
        record_bytes: of the largest layer's records.
        state_bytes: of the optimizer, for a weight.
        asked: the budget in bytes; None: none.

    Raises:
        BudgetError: it does not fit: with what would.
    """
    shape = opened.shape
    size = FLOAT_SIZE_BYTES[shape.dtype]
    largest = max(tensor.n_weights for tensor in shape.expert_tensors)
    inner = max(tensor.shape[0] for tensor in shape.expert_tensors)
    n_weights = shape.experts * shape.n_expert_weights
    skeleton = sum(opened.checkpoint.tensors[n].size_bytes for n in opened.skeleton.tensor_names)
    # The exact layer is let go of before there are codes and states. Scales and where a grid starts
    # are floats, a pair for 32 weights at most.
    moving = n_weights * (1 + state_bytes) + n_weights // 4 + 2 * record_bytes
    parts = {
        "process": current_rss_bytes(),
        "margin": _MARGIN_BYTES,
        "what is beside the experts": skeleton * 4 // size,
        "one layer": max(n_weights * size + record_bytes, moving),
        "one expert": shape.n_expert_weights * (size + 1) + 4 * _WORKING_COPIES * largest,
        "text": 4 * _HIDDEN_COPIES * tokens * shape.hidden,
        "a batch": 4 * max(batch, BATCH_TOKENS) * (16 * shape.hidden + shape.top_k * 3 * inner),
    }
    return require_budget(
        f"tuning a bundle of {opened.identity.name}",
        asked,
        name_lines(parts),
        instead="fewer --tokens",
    )
