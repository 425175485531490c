"""Measured loss of single steps: some tokens are also computed exactly, on the same KV cache."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from moe_tool.errors import UsageError


@dataclass(slots=True, kw_only=True)
class Shadow:
    """Shadow of every `every`th decoded token, with sums over sequences and tokens."""

    every: int
    tokens: int = 0
    divergence: float = 0.0
    """Sum of KL(exact step || lossy step) in nats, both on the lossy run's KV cache"""
    seconds: float = 0.0
    _n_seen: int = 0
    _exact: torch.Tensor | None = None

    @property
    def nats_per_token(self) -> float | None:
        """Measured divergence of a step in nats; None if none was shadowed."""
        return self.divergence / self.tokens if self.tokens else None

    def is_due(self) -> bool:
        """Count a token and return whether it is also to be computed exactly."""
        self._n_seen += 1
        return self._n_seen % self.every == 0

    @torch.inference_mode()
    def compute_exactly(self, model: Any, kwargs: dict[str, Any]) -> None:
        """Run the coming step, of a model with exact answers for the time being, and remove it from
        the KV cache again.

        Raises:
            UsageError: the model's cache cannot be shortened.
        """
        started = time.perf_counter()
        cache = kwargs["past_key_values"]
        n_seen = cache.get_seq_length()
        output = model(**{**kwargs, "use_cache": True, "return_dict": True})
        self._exact = output.logits[:, -1].clone()
        if cache.is_croppable:
            cache.crop(n_seen - cache.get_seq_length())  # negative: how many positions to remove
        if cache.get_seq_length() != n_seen:
            raise UsageError(
                "--shadow: this model's cache cannot be shortened", hint="leave --shadow out"
            )
        self.seconds += time.perf_counter() - started

    def compare(self, logits: torch.Tensor) -> float | None:
        """Return the divergence of the lossy step, nats summed over sequences, from the logits
        [B, V] of its last position; None without shadow."""
        exact, self._exact = self._exact, None
        if exact is None:
            return None
        log_p = torch.log_softmax(exact.double(), dim=-1)
        log_q = torch.log_softmax(logits.double(), dim=-1)
        divergence = float((log_p.exp() * (log_p - log_q)).sum())
        self.divergence += divergence
        self.tokens += len(exact)
        return divergence
