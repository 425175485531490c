"""Estimate of the memory of tuning: one layer, exact or as codes in training."""

from moe_tool.artifacts.moe_shape import FLOAT_SIZE_BYTES
from moe_tool.available_memory import current_rss_bytes
from moe_tool.budget.refusal import TEXT_SLACK_BYTES, name_lines, require_budget
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.architecture import OpenedModel
from moe_tool.models.layer_experts import layer_experts_bytes
from moe_tool.models.model_config import read_config
from moe_tool.runtime.working_set import attention_floats
from moe_tool.text.sequences import TokenSequences
from moe_tool.tuning.eco import state_bytes_per_weight
from moe_tool.tuning.float_weights import FloatWeights
from moe_tool.tuning.judge_floats import SHARES
from moe_tool.tuning.paired_layers import BATCH_TOKENS
from moe_tool.tuning.streamed_bundle import HEAD_TOKENS
from moe_tool.tuning.tune_options import TuneOptions

_MARGIN_BYTES = 160 * 2**20
"""Allocator slack, libraries on first use, dirty file pages"""
_HIDDEN_COPIES = 8
"""Tensors [T, H] in float32 at once: both streams, the bundle's without its experts, the experts'
inputs by batch and joined, the target, and two temporaries"""
_TRAINED_COPIES = 14
"""Tensors [T, H] that a decoder layer keeps for the backward"""
_EXPERT_COPIES = 4
"""Copies of an expert in float32 in the backward: its matrices, and temporaries of the largest"""
_LOGIT_COPIES = 10
"""[T, V] tensors in the loss: both models' logits, their log-probabilities, terms and gradients"""
_FLOAT_COPIES = 14
"""Norms and routers: checkpoint's, trained, both moments, gradients, in use, and thrice while the
state is written"""
_WORKING_COPIES = 6
"""Copies of the largest matrix in float32: weights, slopes, gradient, wanted codes, residuals"""


def require_tune_memory(
    opened: OpenedModel,
    bundle: BundleReader,
    options: TuneOptions,
    sequences: TokenSequences,
    floats: FloatWeights | None,
) -> int:
    """Return the size of the process that tuning will take: of the codes or, after them, of norms
    and routers.

    Args:
        floats: norms and routers to train; None: none.

    Raises:
        BudgetError: it does not fit; the hint names a budget that does.
    """
    always = {
        "process": current_rss_bytes(),
        "margin": _MARGIN_BYTES,
        "what is beside the experts": 4 * opened.skeleton.n_loaded,
    }
    phases = [_codes(opened, bundle, options, n_tokens=sequences.ids.size)]
    if floats is not None:
        phases.append(_floats(opened, bundle, options, sequences, floats))
    largest = max(phases, key=lambda parts: sum(parts.values()))
    return require_budget(
        f"tuning a bundle of {opened.identity.name}",
        options.memory_bytes,
        name_lines(always | largest),
        instead="fewer --tokens",
        slack_bytes=TEXT_SLACK_BYTES,
    )


def _codes(
    opened: OpenedModel, bundle: BundleReader, options: TuneOptions, *, n_tokens: int
) -> dict[str, int]:
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
    return {
        "one layer": max(layer_experts_bytes(opened.experts, shape) + record_bytes, moving),
        "one expert": shape.n_expert_weights * (size + 1)
        + 4 * _WORKING_COPIES * largest
        + opened.decode_bytes,
        "text": 4 * _HIDDEN_COPIES * n_tokens * shape.hidden,
        "a batch": 4
        * max(options.batch, BATCH_TOKENS)
        * (16 * shape.hidden + shape.top_k * 3 * inner),
    }


def _floats(
    opened: OpenedModel,
    bundle: BundleReader,
    options: TuneOptions,
    sequences: TokenSequences,
    floats: FloatWeights,
) -> dict[str, int]:
    shape = opened.shape
    config = read_config(bundle.folder).get_text_config()
    n_tokens, seq_len = sequences.ids.size, sequences.ids.shape[1]
    record_bytes = max(sum(bundle.primary_record_bytes(layer)) for layer in shape.layers)
    inner = max(tensor.shape[0] for tensor in shape.expert_tensors)
    at_once = max(options.batch, seq_len, BATCH_TOKENS)
    per_token = _TRAINED_COPIES * shape.hidden + 4 * attention_floats(config)
    per_token += 4 * shape.experts + 3 * opened.unfused_attention_heads * seq_len
    per_token += shape.top_k * (3 * inner + 4 * shape.hidden)
    n_kinds = int(options.norms) + int(options.router)
    n_judged = int(sequences.held_out.sum()) * seq_len // 2 + seq_len
    states = 2 * n_tokens + (shape.n_decoder_layers + 3) * max(options.batch, seq_len)
    states += (len(SHARES) ** n_kinds + 2) * n_judged
    return {
        "one layer": max(layer_experts_bytes(opened.experts, shape), record_bytes),
        "one expert": 4 * _EXPERT_COPIES * shape.n_expert_weights + opened.decode_bytes,
        "text": 4 * states * shape.hidden,
        "a layer in training": 4 * at_once * per_token,
        "predictions": 4 * _LOGIT_COPIES * HEAD_TOKENS * shape.vocabulary,
        "norms and routers": 4
        * _FLOAT_COPIES
        * sum(each.numel() for each in floats.start.values()),
    }
