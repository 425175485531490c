"""Measured loss of single tokens: some are computed twice, as the policy would and exactly."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from moe_tool.errors import UsageError

_FIRST = frozenset({2, 4, 8, 12})
"""Tokens of a sequence that are measured before the interval is kept"""
_EVERY, _EVERY_IF_DRIFTING = 16, 8


@dataclass(slots=True, kw_only=True)
class Shadow:
    """Measurement of some decoded tokens, with sums over sequences and tokens.

    Such a token is first answered by the policy and taken back from the KV cache, then computed
    exactly, which is its answer: what was read to measure it also makes it exact.
    """

    every: int | None
    """Interval in decoded tokens; None: the first tokens of a sequence often, then every 16th, on
    text that is routed unlike the profile's every 8th"""
    tokens: int = 0
    divergence: float = 0.0
    """Sum of KL(exact step || lossy step) in nats, both on the run's KV cache"""
    seconds: float = 0.0
    _n_seen: int = 0
    _lossy: torch.Tensor | None = None

    @property
    def nats_per_token(self) -> float | None:
        """Measured divergence of a step in nats; None if none was measured."""
        return self.divergence / self.tokens if self.tokens else None

    def begin_sequence(self) -> None:
        """Begin to count tokens anew."""
        self._n_seen = 0

    def is_due(self, cache: Any, *, is_drifting: bool) -> bool:
        """Count a token and return whether it is to be measured.

        Raises:
            UsageError: it is, as asked for, and the cache cannot go back a step.
        """
        self._n_seen += 1
        if self.every is not None:
            is_due = self._n_seen % self.every == 0
            if is_due and not cache.is_croppable:
                raise UsageError(
                    "--shadow: this model's cache cannot go back", hint="leave --shadow out"
                )
            return is_due
        every = _EVERY_IF_DRIFTING if is_drifting else _EVERY
        is_due = self._n_seen in _FIRST or self._n_seen % every == 0
        return is_due and bool(cache.is_croppable)

    @torch.inference_mode()
    def run_lossily(self, model: Any, kwargs: dict[str, Any]) -> None:
        """Run the coming step by the policy and remove it from the KV cache again."""
        started = time.perf_counter()
        cache = kwargs["past_key_values"]
        n_seen = cache.get_seq_length()
        # A step makes new tensors, or fills places beyond the length. `crop` knows no full window.
        held = [dict(vars(layer)) for layer in cache.layers]
        output = model(**{**kwargs, "use_cache": True, "return_dict": True})
        self._lossy = output.logits[:, -1].clone()
        for layer, before in zip(cache.layers, held, strict=True):
            vars(layer).clear()
            vars(layer).update(before)
        assert cache.get_seq_length() == n_seen, "the step was not taken back"
        self.seconds += time.perf_counter() - started

    def compare(self, logits: torch.Tensor) -> float | None:
        """Return the divergence of the lossy step, nats summed over sequences, from the exact
        logits [B, V] of its last position; None if it was not measured."""
        lossy, self._lossy = self._lossy, None
        if lossy is None:
            return None
        log_p = torch.log_softmax(logits.double(), dim=-1)
        log_q = torch.log_softmax(lossy.double(), dim=-1)
        divergence = float((log_p.exp() * (log_p - log_q)).sum())
        self.divergence += divergence
        self.tokens += len(logits)
        return divergence
