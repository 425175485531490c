"""Some tokens computed twice, once exactly, on the same cache: the loss of one step, measured."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from moe_tool.errors import UsageError


@dataclass(slots=True, kw_only=True)
class Shadow:
    """Every `every`th decoded token of a run. Sums over its sequences and tokens."""

    every: int
    tokens: int = 0
    divergence: float = 0.0
    """Nats: KL(exact step || lossy step), both from the cache that the lossy run left"""
    seconds: float = 0.0
    _n_seen: int = 0
    _exact: torch.Tensor | None = None

    @property
    def nats_per_token(self) -> float | None:
        """Measured divergence of a step; None where none was shadowed."""
        return self.divergence / self.tokens if self.tokens else None

    def is_due(self) -> bool:
        """Count a token and return whether it is to be computed twice."""
        self._n_seen += 1
        return self._n_seen % self.every == 0

    @torch.inference_mode()
    def compute_exactly(self, model: Any, kwargs: dict[str, Any]) -> None:
        """Run the coming step and take it back from the cache again.

        Args:
            model: answers exactly meanwhile.
            kwargs: of the forward that is to come, a cache among them.

        Raises:
            UsageError: the model's cache cannot be shortened.
        """
        started = time.perf_counter()
        cache = kwargs["past_key_values"]
        n_seen = cache.get_seq_length()
        output = model(**{**kwargs, "use_cache": True, "return_dict": True})
        self._exact = output.logits[:, -1].clone()
        cache.crop(n_seen - cache.get_seq_length())  # less than none: so many are taken back
        if cache.get_seq_length() != n_seen:
            raise UsageError(
                "--shadow: this model's cache cannot be shortened", hint="leave --shadow out"
            )
        self.seconds += time.perf_counter() - started

    def compare(self, logits: torch.Tensor) -> float | None:
        """Judge the step itself, and return its divergence, of all sequences together; None where
        it was not shadowed.

        Args:
            logits: [B, V] of its last position.
        """
        exact, self._exact = self._exact, None
        if exact is None:
            return None
        log_p = torch.log_softmax(exact.double(), dim=-1)
        log_q = torch.log_softmax(logits.double(), dim=-1)
        divergence = float((log_p.exp() * (log_p - log_q)).sum())
        self.divergence += divergence
        self.tokens += len(exact)
        return divergence
