"""Prediction of a text one token per forward, as in a run, with residency in the loop.

One wide forward over a text would hide what a lossy policy does: all tokens of a layer would be
answered at once, and none would read a KV cache changed by earlier answers.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch

from moe_tool.artifacts.routing import PRIMARY
from moe_tool.runtime.moe_layer import Decision
from moe_tool.runtime.session import Session

N_PROMPT_TOKENS = 1
"""Length of a sequence's prompt, which every policy answers exactly and which is not scored"""
_REFERENCE_CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCosts:
    """Costs of each token of a batch, [B, P] float64 each, as if each sequence had run alone.

    An access is a (token, layer, expert), unlike in a run's counters, where tokens of one forward
    share it.
    """

    hits: np.ndarray
    accesses: np.ndarray
    bytes_read: np.ndarray
    """Bytes of fetched records"""
    reads: np.ndarray
    """Slots whose answer is fetched"""
    substitutions: np.ndarray
    replica_answers: np.ndarray
    """Slots answered by a replica"""
    drops: np.ndarray
    expected: np.ndarray
    """Nats that the answers are expected to cost; NaN without prices"""
    exact_fallbacks: np.ndarray
    """1 where the token was answered exactly to keep a calibrated limit"""

    @classmethod
    def zeros(cls, shape: tuple[int, int]) -> Self:
        """Return costs of 0."""
        return cls(**{each.name: np.zeros(shape) for each in fields(cls)})


Visit = Callable[[int, torch.Tensor], None]
"""Callback for a position and the logits [B, V] there"""


def n_scored(seq_len: int) -> int:
    """Return P, the scored predictions of a sequence: all but the prompt's and the last."""
    return seq_len - 1 - N_PROMPT_TOKENS


@torch.inference_mode()
def run_stepwise(session: Session, ids: torch.Tensor, visit: Visit) -> TokenCosts:
    """Feed a batch token by token under the session's policy.

    Args:
        session: an open session. Batches are for frozen residency, where a sequence's answers do
            not depend on what others have fetched.
        ids: [B, S] int64.
        visit: called for positions 1 to S - 2, in order.

    Returns:
        Costs with one column per visited position.
    """
    n_sequences, seq_len = ids.shape
    costs = TokenCosts.zeros((n_sequences, n_scored(seq_len)))
    if session.runner.policy.prices is None:
        costs.expected[:] = np.nan
    record_bytes, column = session.runner.record_bytes, -N_PROMPT_TOKENS

    def account(decision: Decision) -> None:
        sizes = record_bytes[decision.routing.layer]
        if session.runner.is_probe:  # taken back, but for what it read
            _count_reads(costs, column, decision, sizes)
            return
        _account(costs, column, decision, sizes)
        if decision.spent is not None:
            costs.expected[:, column] += session.runner.account.nats_per_price * decision.spent
        if session.runner.forward.exact_fallback is not None:
            costs.exact_fallbacks[:, column] = session.runner.forward.exact_fallback

    cache = session.new_cache()
    session.prompt_tokens = N_PROMPT_TOKENS
    session.runner.on_decision = account
    try:
        for position in range(seq_len - 1):
            column = position - N_PROMPT_TOKENS
            n_bytes = session.runner.stats.decode.bytes_read
            output = session.model(
                input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True
            )
            if session.runner.sparsity is not None:  # a single sequence did all reads
                costs.bytes_read[:, column] = session.runner.stats.decode.bytes_read - n_bytes
            if column >= 0:
                visit(position, output.logits[:, -1])
    finally:
        session.runner.on_decision = None
        session.prompt_tokens = None
    return costs


def _account(costs: TokenCosts, column: int, decision: Decision, record_bytes: np.ndarray) -> None:
    """Add the costs of one layer's answers to one token of every sequence."""
    wanted, answer = decision.routing.index, decision.answers.expert  # [B, K]
    form, is_answered = decision.answers.form, decision.answers.present
    is_present = decision.routing.present
    is_there = is_present & decision.resident[PRIMARY][wanted]
    costs.hits[:, column] += is_there.sum(axis=1)
    costs.accesses[:, column] += is_present.sum(axis=1)
    costs.substitutions[:, column] += (is_answered & (answer != wanted)).sum(axis=1)
    costs.drops[:, column] += (is_present & ~is_answered).sum(axis=1)
    costs.replica_answers[:, column] += (is_answered & (form != PRIMARY)).sum(axis=1)
    _count_reads(costs, column, decision, record_bytes)


def _count_reads(
    costs: TokenCosts, column: int, decision: Decision, record_bytes: np.ndarray
) -> None:
    """Add the reads of one layer's answers to one token of every sequence."""
    answer, form = decision.answers.expert, decision.answers.form
    is_fetched = decision.answers.present & ~decision.resident[form, answer]
    costs.reads[:, column] += is_fetched.sum(axis=1)
    costs.bytes_read[:, column] += (is_fetched * record_bytes[form, answer]).sum(axis=1)


@torch.inference_mode()
def exact_logits(session: Session, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits with every miss fetched, [B, S, V] float32, under any session policy.

    Exact answers do not depend on the order of work, so many positions go through at once.

    Args:
        ids: [B, S] int64.
    """
    n_sequences, seq_len = ids.shape
    vocabulary = session.manifest.shape.vocabulary
    logits = torch.empty(n_sequences, seq_len, vocabulary)
    chunk = reference_chunk(vocabulary)
    session.prompt_tokens = seq_len
    try:
        for row in range(n_sequences):
            cache = session.new_cache()
            for start in range(0, seq_len, chunk):
                part = ids[row : row + 1, start : start + chunk]
                output = session.model(input_ids=part, past_key_values=cache, use_cache=True)
                logits[row, start : start + chunk] = output.logits[0]
    finally:
        session.prompt_tokens = None
    return logits


def reference_chunk(vocabulary: int) -> int:
    """Return the number of positions per forward in `exact_logits`."""
    return max(16, min(256, _REFERENCE_CHUNK_BYTES // (4 * vocabulary)))
