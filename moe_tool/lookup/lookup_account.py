"""Memory account of a run of a lookup bundle: everything but the table, and a chunk's rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from moe_tool.budget.account import MARGIN_BYTES
from moe_tool.budget.refusal import (
    MemoryLine,
    lacks_memory,
    name_lines,
    require_budget,
    sum_lines,
)
from moe_tool.budget.request import MemoryRequest
from moe_tool.errors import UsageError
from moe_tool.lookup.disk_rows import BLOCK_BYTES
from moe_tool.models.mole.config import MoleConfig
from moe_tool.runtime.working_set import Workload, kv_cache_bytes

_ROWS_BYTES = 16 * 2**20
"""Most bytes of the rows of a chunk of the prompt; one token's rows may be more"""
_MOST_CHUNK = 256
_LOGIT_COPIES = 10
_BLOCK_COPIES = 6
"""Tensors of a block's size alive while its codes are decoded"""
_SCRATCH_BYTES = 16 * 2**20
"""Scratch of the matrix library"""
_AUTO_SHARE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupAccount:
    """Memory of a run that keeps its budget."""

    lines: tuple[MemoryLine, ...]
    budget_bytes: int
    """Limit of the process; at least the sum of the lines"""


def chunk_of(config: MoleConfig) -> int:
    """Return the prompt tokens of one forward: as many as have rows of 16 MiB, 1 to 256."""
    return max(1, min(_MOST_CHUNK, _ROWS_BYTES // (4 * config.row_width)))


def account_for(
    request: MemoryRequest | None,
    config: MoleConfig,
    *,
    positions: int,
    process_bytes: int,
    skeleton_bytes: int,
    loading_bytes: int,
    available_bytes: int,
    beside: Mapping[str, int] = MappingProxyType({}),
) -> LookupAccount:
    """Return the account of a run of one sequence, or refuse it.

    Args:
        request: budget of the process; None: 90 % of what is available.
        positions: prompt and generated tokens.
        process_bytes: size of the process without the skeleton.
        skeleton_bytes: size of the loaded skeleton.
        loading_bytes: size of the largest tensor while it is read.
        available_bytes: size that the process can reach.
        beside: bytes that the caller takes, by name.

    Raises:
        UsageError: the budget is a share of the experts, which are not in memory.
        BudgetError: the budget, or the machine, is too small.
    """
    if request is not None and request.kind == "share":
        raise UsageError(
            f"--memory {request}: the experts of a lookup bundle stay on disk, there is no share "
            "of them to keep",
            hint="write 4GiB, min or auto",
        )
    chunk = chunk_of(config)
    workload = Workload(batch=1, positions=positions, prompt_tokens=positions)
    lines = name_lines(
        {
            "process and its libraries": process_bytes,
            "skeleton": skeleton_bytes,
            f"KV cache, {positions} positions": kv_cache_bytes(config, workload),
            f"rows of {chunk} tokens": 4 * chunk * config.row_width + _BLOCK_COPIES * BLOCK_BYTES,
            "working buffers": _buffer_bytes(config, chunk, positions),
            **beside,
            "margin": MARGIN_BYTES,
        }
    )
    is_auto = request is None or request.kind == "auto"
    stated = request.size_bytes if request is not None and request.kind == "bytes" else None
    budget = int(available_bytes * _AUTO_SHARE) if is_auto else stated
    peak = process_bytes + skeleton_bytes + loading_bytes
    needed = require_budget("the run", budget, lines, peak_bytes=peak)
    if needed > available_bytes:
        raise lacks_memory(needed, least_bytes=needed, free_bytes=available_bytes, lines=lines)
    return LookupAccount(lines=lines, budget_bytes=max(needed, sum_lines(lines), stated or 0))


def _buffer_bytes(config: MoleConfig, chunk: int, positions: int) -> int:
    """Return the bytes of the tensors of one layer and of the choice of a token."""
    width, head = config.hidden_size, config.head_dim or 0
    values = config.num_experts * (width + 1)  # rows in the order of tokens, and gates
    values += 3 * config.intermediate_size + 8 * width
    values += (2 * config.num_attention_heads + 2 * (config.num_key_value_heads or 0)) * head
    mask = chunk * positions * 5
    return 4 * (chunk * values + _LOGIT_COPIES * config.vocab_size) + mask + _SCRATCH_BYTES
