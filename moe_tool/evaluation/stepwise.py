"""Predictions one token per forward, as a run makes them, with residency in the loop.

One wide forward over a text would hide what a lossy policy does: there, every token of a layer is
answered at once, and no token reads a KV cache that earlier answers have already changed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from moe_tool.artifacts.routing import PRIMARY
from moe_tool.runtime.moe_layer import Decision
from moe_tool.runtime.session import Session

N_PROMPT_TOKENS = 1
"""The first token of a sequence is its prompt, which every policy answers exactly; it is not
scored."""
_REFERENCE_CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCosts:
    """What the policy did for each token of a batch of sequences, as if each sequence had run
    alone.

    An access is a (token, layer, expert), unlike in a run's own counters, where tokens of one
    forward share it.
    """

    hits: np.ndarray
    """[B, P]"""
    accesses: np.ndarray
    """[B, P]"""
    bytes_read: np.ndarray
    """[B, P]: records fetched, not those found in the cache by luck"""
    substitutions: np.ndarray
    """[B, P]"""
    lowered: np.ndarray
    """[B, P]: slots answered by a replica"""
    drops: np.ndarray
    """[B, P]"""
    expected: np.ndarray
    """[B, P]: nats that the price list expects the answers to cost; NaN without prices"""
    retreated: np.ndarray
    """[B, P]: 1 where the token was answered exactly to keep a calibrated limit"""


Visit = Callable[[int, torch.Tensor], None]
"""(position, logits [B, V] at that position)"""


def n_scored(seq_len: int) -> int:
    """Return P, the scored predictions of a sequence: all but the prompt's, and the last has no
    target."""
    return seq_len - 1 - N_PROMPT_TOKENS


@torch.inference_mode()
def run_stepwise(session: Session, ids: torch.Tensor, visit: Visit) -> TokenCosts:
    """Feed a batch token by token under the session's policy.

    Args:
        session: its policy and residency decide. More than one sequence at a time is meant for
        frozen residency, where
            a sequence's answers do not depend on what others have fetched.
        ids: [B, S] int64.
        visit: called for positions 1 to S - 2, in order.

    Returns:
        One column for each visited position.
    """
    n_sequences, seq_len = ids.shape
    ledger = np.zeros((8, n_sequences, n_scored(seq_len)))
    position = 0
    if session.runner.policy.prices is None:
        ledger[6] = np.nan
    sizes = session.runner.record_bytes

    def account(decision: Decision) -> None:
        wanted, answer = decision.routing.index, decision.answers.expert  # [B, K]
        form, is_answered = decision.answers.form, decision.answers.present
        is_present = decision.routing.present
        is_there = is_present & decision.resident[PRIMARY][wanted]
        is_fetched = is_answered & ~decision.resident[form, answer]
        column = position - N_PROMPT_TOKENS
        ledger[0, :, column] += is_there.sum(axis=1)
        ledger[1, :, column] += is_present.sum(axis=1)
        ledger[2, :, column] += (is_fetched * sizes[decision.routing.layer][form, answer]).sum(
            axis=1
        )
        ledger[3, :, column] += (is_answered & (answer != wanted)).sum(axis=1)
        ledger[4, :, column] += (is_present & ~is_answered).sum(axis=1)
        ledger[5, :, column] += (is_answered & (form != PRIMARY)).sum(axis=1)
        if decision.spent is not None:
            ledger[6, :, column] += session.runner.account.nats_per_price * decision.spent
        if session.runner.forward.exact_fallback is not None:
            ledger[7, :, column] = session.runner.forward.exact_fallback

    cache = session.new_cache()
    session.prompt_tokens = N_PROMPT_TOKENS
    session.runner.on_decision = account
    try:
        for position in range(seq_len - 1):
            n_bytes = session.runner.stats.decode.bytes_read
            output = session.model(
                input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True
            )
            if session.runner.sparsity is not None:  # one sequence: what was read is its own
                read = session.runner.stats.decode.bytes_read - n_bytes
                ledger[2, :, position - N_PROMPT_TOKENS] = read
            if position >= N_PROMPT_TOKENS:
                visit(position, output.logits[:, -1])
    finally:
        session.runner.on_decision = None
        session.prompt_tokens = None
    return TokenCosts(
        hits=ledger[0],
        accesses=ledger[1],
        bytes_read=ledger[2],
        substitutions=ledger[3],
        drops=ledger[4],
        lowered=ledger[5],
        expected=ledger[6],
        retreated=ledger[7],
    )


@torch.inference_mode()
def exact_logits(session: Session, ids: torch.Tensor) -> torch.Tensor:
    """Return the bundle's own predictions with every expert fetched, whatever the session's policy.

    Exact answers do not depend on the order of work, so many positions go through at once.

    Args:
        session: of the bundle.
        ids: [B, S] int64.

    Returns:
        [B, S, V] float32.
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
    """Return how many positions of one sequence `exact_logits` takes at once."""
    return max(16, min(256, _REFERENCE_CHUNK_BYTES // (4 * vocabulary)))
