"""Stream of generated tokens as text."""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

OnText = Callable[[str], None]
_REPLACEMENT = "\ufffd"


class TextStream(BaseStreamer):
    """Streamer that collects tokens and passes on text that no later token can change.

    A character may take several tokens (bytes of UTF-8), and some tokenizers decode a token
    differently at the start of a text. So every piece is decoded together with the one before it,
    and held back while it ends in an unfinished character.
    """

    def __init__(self, tokenizer: Any, on_text: OnText | None) -> None:
        self.token_ids: list[list[int]] = []
        """Generated tokens, one list per sequence"""
        self.first_token_at: float | None = None
        """time.perf_counter() when the first token was chosen"""
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._is_prompt = True
        self._context_start = 0
        self._n_shown = 0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (once), then one token per sequence at a time."""
        if self._is_prompt:
            self._is_prompt = False
            self.token_ids = [[] for _ in range(value.shape[0] if value.ndim > 1 else 1)]
            return
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        for sequence, token in zip(self.token_ids, value.tolist(), strict=True):
            sequence.append(token)
        self._show(is_last=False)

    def end(self) -> None:
        """Pass on the text that was held back."""
        self._show(is_last=True)

    def _show(self, *, is_last: bool) -> None:
        if self._on_text is None or len(self.token_ids) != 1:
            return
        tokens = self.token_ids[0]
        context = self._decode(tokens[self._context_start : self._n_shown])
        text = self._decode(tokens[self._context_start :])
        if len(text) <= len(context) or (text.endswith(_REPLACEMENT) and not is_last):
            return
        self._on_text(text[len(context) :])
        self._context_start, self._n_shown = self._n_shown, len(tokens)

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text
