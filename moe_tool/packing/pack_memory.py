"""Estimate of the memory of packing: one expert at a time, or one layer if codes are fitted to
experts' inputs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from moe_tool.allocator import trim
from moe_tool.artifacts.moe_shape import FLOAT_SIZE_BYTES
from moe_tool.available_memory import current_rss_bytes
from moe_tool.budget.refusal import TEXT_SLACK_BYTES, name_lines, require_budget
from moe_tool.models.architecture import OpenedModel
from moe_tool.models.layer_experts import layer_experts_bytes
from moe_tool.models.row_tables import RowTable

MOST_HIDDEN_BYTES = 128 * 2**20
"""Size of the hidden states carried from layer to layer, and again of one layer's inputs"""
_LEAST_TOKENS = 2048
"""Fewest tokens whose hidden states have to fit: fewer say too little about an expert"""
_BATCH_TOKENS = 2048
_FITTED_TOKENS = 8192
_MARGIN_BYTES = 160 * 2**20
"""Allocator slack, libraries on first use, dirty file pages"""
_WORKING_COPIES = 6
"""Copies of the largest matrix in float32 while its codes are chosen: weights, codes, steps,
remainder, and two temporaries; or, of a quantized checkpoint, while expert 0 tells how the rows of
codes lie, which takes four"""
_SQUARES = 7
"""Matrices [in, in] in float32: second moments, damped, ordered, factor, inverse and its factor"""
PROOF_TOKENS = 4
"""Tokens of the forward that proves a bundle: few, since each reads K experts of every layer"""
_PROOF_COPIES = 4
"""Logits of all tokens in 64 bits: of both forwards, and as probabilities"""
_NESTED_SQUARES = 3
"""Matrices [in, in] of the whole codes, kept while the base's are made"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackMemory:
    """Memory plan of a pack."""

    needed_bytes: int
    """Expected peak of the process"""
    hidden_bytes: int
    """Limit of the hidden states carried from layer to layer"""


def plan_pack_memory(
    opened: OpenedModel,
    *,
    n_tokens: int,
    is_nested: bool = False,
    in_place: bool = False,
    in_turn_bytes: int = 0,
    on_disk: Mapping[str, RowTable] = MappingProxyType({}),
    asked: int | None,
) -> PackMemory:
    """Return the memory that packing will take.

    Args:
        n_tokens: tokens of the profile that go through the model; 0: none do.
        is_nested: codes are chosen for two widths at once.
        in_place: records are compared with what the checkpoint's files hold.
        in_turn_bytes: most bytes of the skeleton that a forward holds, one layer at a time.
        on_disk: embedding tables that pass through in pieces, and of which a forward reads rows.
        asked: the budget in bytes; None: no limit, all tokens are used.

    Raises:
        BudgetError: it does not fit; the hint names a budget that does.
    """
    shape, size = opened.shape, FLOAT_SIZE_BYTES[opened.shape.dtype]
    matrices = [tensor.shape for tensor in shape.expert_tensors if len(tensor.shape) == 2]
    record = shape.n_expert_weights * (size + 1)
    read_ahead = shape.n_expert_weights * 2 * size  # as it lies on the disk, and put together
    copies = 4 * _WORKING_COPIES * (2 if is_nested else 1)
    streamed = {info.name: math.prod(info.shape) for t in on_disk.values() for info in t.parts}
    names = opened.skeleton.tensor_names
    skeleton = [opened.checkpoint.tensors[n].size_bytes for n in names if n not in streamed]
    parts = {"process": _process_bytes(), "margin": _MARGIN_BYTES}
    decoding = {"decoding of one matrix": opened.decode_bytes}
    comparing = {"one matrix from the checkpoint's files": record if in_place else 0}
    parts |= {name: held for name, held in (decoding | comparing).items() if held}
    # The forward that proves the bundle: a layer of the skeleton and an expert, being read.
    logits = 8 * PROOF_TOKENS * _PROOF_COPIES * shape.vocabulary
    proof = sum(parts.values()) + in_turn_bytes + record + read_ahead + logits
    if not n_tokens:
        largest = max(n_out * n_in for n_out, n_in in matrices)
        one = record + copies * largest + read_ahead
        parts["one expert, and the next"] = max(one, 3 * max(skeleton, default=0))
        return PackMemory(needed_bytes=_require(opened, asked, parts, proof), hidden_bytes=0)
    squares = 4 * (_SQUARES + (_NESTED_SQUARES if is_nested else 0))
    inner = max(n_out for n_out, _ in matrices)
    n_batch, n_fitted = min(_BATCH_TOKENS, n_tokens), min(_FITTED_TOKENS, n_tokens)
    # All but those tables stays in memory, in float32.
    parts["one layer"] = layer_experts_bytes(opened.experts, shape)
    parts["what is beside the experts"] = 4 * (opened.skeleton.n_weights - sum(streamed.values()))
    # Tokens go through a layer before its experts are quantized, one matrix after the other.
    batch = 4 * n_batch * (16 * shape.hidden + shape.top_k * 2 * inner)
    given = 4 * n_fitted * (shape.hidden + 3 * inner)
    working = max(copies * n_out * n_in + squares * n_in**2 for n_out, n_in in matrices)
    parts["a batch, or one expert with its inputs"] = max(batch, record + given + working)
    fixed = sum(parts.values())
    least, most = 12 * min(_LEAST_TOKENS, n_tokens) * shape.hidden, 4 * n_tokens * shape.hidden
    _require(opened, asked, parts | {"hidden states": least}, proof)
    most = min(MOST_HIDDEN_BYTES, most)
    hidden = most if asked is None else min(most, (asked - fixed) // 3)
    return PackMemory(needed_bytes=max(fixed + 3 * hidden, proof), hidden_bytes=hidden)


def _process_bytes() -> int:
    """Return the size of the process, without what opening the checkpoint has freed."""
    trim()
    return current_rss_bytes()


def _require(opened: OpenedModel, asked: int | None, parts: dict[str, int], proof: int) -> int:
    return require_budget(
        f"packing {opened.identity.name}",
        asked,
        name_lines(parts),
        peak_bytes=proof,
        instead="a --quantizer that needs no inputs" if "one layer" in parts else None,
        slack_bytes=TEXT_SLACK_BYTES,
    )
