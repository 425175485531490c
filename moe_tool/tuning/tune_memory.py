"""Estimate of the memory of tuning: one layer, exact or as codes in training."""

from moe_tool.artifacts.moe_shape import FLOAT_SIZE_BYTES
from moe_tool.available_memory import current_rss_bytes
from moe_tool.budget.refusal import name_lines, require_budget
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.architecture import OpenedModel
from moe_tool.models.layer_experts import layer_experts_bytes
from moe_tool.tuning.eco import state_bytes_per_weight
from moe_tool.tuning.paired_layers import BATCH_TOKENS
from moe_tool.tuning.tune_options import TuneOptions

_MARGIN_BYTES = 160 * 2**20
"""Allocator slack, libraries on first use, dirty file pages"""
_HIDDEN_COPIES = 8
"""Tensors [T, H] in float32 at once: both streams, the bundle's without its experts, the experts'
inputs by batch and joined, the target, and two temporaries"""
_WORKING_COPIES = 6
"""Copies of the largest matrix in float32: weights, slopes, gradient, wanted codes, residuals"""


def require_tune_memory(
    opened: OpenedModel, bundle: BundleReader, options: TuneOptions, *, n_tokens: int
) -> int:
    """Return the size of the process that tuning will take.

    Raises:
        BudgetError: it does not fit; the hint names a budget that does.
    """
    shape = opened.shape
    record_bytes = max(sum(bundle.primary_record_bytes(layer)) for layer in shape.layers)
    size = FLOAT_SIZE_BYTES[shape.dtype]
    largest = max(tensor.n_weights for tensor in shape.expert_tensors)
    inner = max(tensor.shape[0] for tensor in shape.expert_tensors)
    n_weights = shape.experts * shape.n_expert_weights
    # The exact layer is freed before codes and states exist. Slopes and starts are floats, a pair
    # for 32 weights at most.
    moving = (
        n_weights * (1 + state_bytes_per_weight(options.rule)) + n_weights // 4 + 2 * record_bytes
    )
    parts = {
        "process": current_rss_bytes(),
        "margin": _MARGIN_BYTES,
        "what is beside the experts": 4 * opened.skeleton.n_loaded,
        "one layer": max(layer_experts_bytes(opened.experts, shape) + record_bytes, moving),
        "one expert": shape.n_expert_weights * (size + 1)
        + 4 * _WORKING_COPIES * largest
        + opened.decode_bytes,
        "text": 4 * _HIDDEN_COPIES * n_tokens * shape.hidden,
        "a batch": 4
        * max(options.batch, BATCH_TOKENS)
        * (16 * shape.hidden + shape.top_k * 3 * inner),
    }
    return require_budget(
        f"tuning a bundle of {opened.identity.name}",
        options.memory_bytes,
        name_lines(parts),
        instead="fewer --tokens",
    )
