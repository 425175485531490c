"""Access traces of a profile's tokens: token by token as in decoding, or in chunks as a prompt."""

from typing import Literal

import numpy as np

from moe_tool.artifacts.access_trace import AccessTrace
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.policies.eviction import gate_scores

Part = Literal["held-out", "in-sample"]
PROMPT_TOKENS = 256
"""Prompt tokens per forward, as in the runtime"""


def decode_trace(
    profile: ProfileReader,
    part: Part,
    *,
    max_tokens: int | None = None,
    with_scores: bool = False,
    with_guesses: bool = False,
) -> AccessTrace:
    """Return the trace of one part's sequences in turn, one token per forward.

    Args:
        max_tokens: limit on the tokens in whole sequences, at least one, spread over the part.
        with_scores: include router scores, 2 bytes per token, layer and expert.
        with_guesses: include the predictions of the next layers' routers.
    """
    rows = rows_of_part(profile, part, max_tokens)
    shape = profile.header.shape
    n_tokens, n_layers, n_experts = len(rows), len(shape.layers), shape.experts
    n_guesses = [min(3, n_layers - 1 - at) * shape.top_k for at in range(n_layers)]
    keys = np.empty((n_tokens, n_layers, shape.top_k), np.int32)
    scores = np.empty((n_tokens, n_layers, n_experts), np.uint16) if with_scores else None
    guesses = np.empty((n_tokens, sum(n_guesses)), np.int32) if with_guesses else None
    done = 0
    for at, layer in enumerate(shape.layers):
        chosen = profile.indices(layer, "top_k_index")[rows].astype(np.int32)
        keys[:, at] = np.sort(chosen, axis=1) + at * n_experts
        if scores is not None:
            scores[:, at] = gate_scores(profile.router_logits(layer)[rows][:, None, :])
        if guesses is not None and n_guesses[at]:
            named = profile.indices(layer, "next_gate_index")[:, rows].astype(np.int32)  # [D, T, K]
            named += (at + 1 + np.arange(len(named), dtype=np.int32))[:, None, None] * n_experts
            guesses[:, done : done + n_guesses[at]] = named.transpose(1, 0, 2).reshape(n_tokens, -1)
            done += n_guesses[at]
    n_calls = n_tokens * n_layers
    begins = np.zeros((n_tokens, n_layers), bool)
    begins[rows % profile.header.seq_len == 0, 0] = True
    flat = keys.reshape(n_calls, shape.top_k)
    is_first = np.ones(flat.shape, bool)  # an expert chosen twice by a token is one access
    is_first[:, 1:] = flat[:, 1:] != flat[:, :-1]
    return AccessTrace(
        n_layers=n_layers,
        n_experts=n_experts,
        layer=np.tile(np.arange(n_layers, dtype=np.int32), n_tokens),
        start=np.concatenate([[0], np.cumsum(is_first.sum(axis=1))]).astype(np.int64),
        keys=flat[is_first],
        forward=np.repeat(np.arange(n_tokens, dtype=np.int32), n_layers),
        scores=None if scores is None else scores.reshape(n_calls, n_experts),
        guess_start=None
        if guesses is None
        else np.concatenate([[0], np.cumsum(np.tile(n_guesses, n_tokens))]).astype(np.int64),
        guesses=None if guesses is None else guesses.reshape(-1),
        begins=begins.reshape(-1),
    )


def prompt_trace(profile: ProfileReader, part: Part) -> tuple[AccessTrace, int]:
    """Return the trace of one part's sequences as prompts in chunks, and the number of tokens."""
    rows = rows_of_part(profile, part)
    shape = profile.header.shape
    n_layers, n_experts, seq_len = len(shape.layers), shape.experts, profile.header.seq_len
    # Chunk number of every token; each sequence begins a new chunk.
    per_sequence = -(-seq_len // PROMPT_TOKENS)
    position = np.arange(len(rows))
    chunk = position // seq_len * per_sequence + position % seq_len // PROMPT_TOKENS
    n_chunks = int(chunk[-1]) + 1 if len(rows) else 0
    named = np.zeros((n_chunks, n_layers, n_experts), bool)
    for at, layer in enumerate(shape.layers):
        named[chunk[:, None], at, profile.indices(layer, "top_k_index")[rows]] = True
    sizes = named.sum(axis=2).reshape(-1)
    begins = np.zeros((n_chunks, n_layers), bool)
    begins[::per_sequence, 0] = True
    keys = np.nonzero(named.reshape(n_chunks, n_layers * n_experts))[1]
    trace = AccessTrace(
        n_layers=n_layers,
        n_experts=n_experts,
        layer=np.tile(np.arange(n_layers, dtype=np.int32), n_chunks),
        start=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        keys=keys.astype(np.int32),
        forward=np.repeat(np.arange(n_chunks, dtype=np.int32), n_layers),
        begins=begins.reshape(-1),
    )
    return trace, len(rows)


def part_to_replay(profile: ProfileReader) -> Part:
    """Return held-out, or in-sample if nothing is held out."""
    return "held-out" if bool(profile.tokens.held_out.any()) else "in-sample"


def rows_of_part(profile: ProfileReader, part: Part, max_tokens: int | None = None) -> np.ndarray:
    """Return the rows (tokens) of a part, ascending; with `max_tokens`, of about so many tokens in
    whole sequences, spread over the part."""
    tokens = profile.tokens
    chosen = np.flatnonzero(tokens.held_out == (part == "held-out"))
    seq_len = tokens.ids.shape[1]
    if max_tokens is not None and len(chosen) * seq_len > max_tokens:
        count = max(1, max_tokens // seq_len)
        chosen = chosen[np.arange(count) * len(chosen) // count]
    rows: np.ndarray = (chosen[:, None] * seq_len + np.arange(seq_len)).reshape(-1)
    return rows
