"""Tokens that `bench` feeds: text, for realistic routing, or random ids."""

from typing import Any

import numpy as np
import torch

from moe_tool.errors import DataSourceError
from moe_tool.progress import SILENT, Progress
from moe_tool.text.sequences import build_sequences
from moe_tool.text.sources import parse_sources

SOURCE = "builtin:eval"
"""Text that a profile of the built-in text has not seen"""
_BLOCK_TOKENS = 128


def bench_tokens(
    tokenizer: Any,
    *,
    n_tokens: int,
    vocabulary: int,
    seed: int,
    random: bool,
    progress: Progress = SILENT,
) -> tuple[torch.Tensor, str]:
    """Return tokens to feed, [n_tokens] int64 below `vocabulary`, and "text" or "random".

    Text that is too short is repeated. With a tokenizer whose ids the model does not have, the ids
    are random, which is reported once.

    Args:
        tokenizer: a transformers tokenizer.
        random: whether to skip text.
    """
    if not random:
        try:
            ids = _text_ids(tokenizer, n_tokens, vocabulary, seed)
            return torch.from_numpy(np.resize(ids, n_tokens)), "text"
        except DataSourceError as error:
            progress.note(f"random token ids instead of text: {error.message}")
    # The first two ids of most vocabularies mark the beginning and end of a text.
    low = min(2, vocabulary - 1)
    drawn = np.random.default_rng(seed).integers(low, vocabulary, n_tokens)
    return torch.from_numpy(drawn), "random"


def _text_ids(tokenizer: Any, n_tokens: int, vocabulary: int, seed: int) -> np.ndarray:
    text = build_sequences(
        parse_sources([SOURCE]),
        tokenizer,
        vocabulary=vocabulary,
        n_tokens=n_tokens,
        seq_len=_BLOCK_TOKENS,
        holdout=0.0,
        seed=seed,
    )
    # The domains alternate block by block, so that every window has both.
    rank = np.arange(len(text.domain)) - np.searchsorted(text.domain, text.domain)
    order = np.argsort(rank, kind="stable")
    return text.ids[order].astype(np.int64).reshape(-1)
