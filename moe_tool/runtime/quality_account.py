"""What lossy answers are expected to have cost, token by token, and when that is enough."""

from dataclasses import dataclass, field

import numpy as np

MIN_JUDGED_TOKENS = 8
WINDOW_TOKENS = 128
"""Over about so many tokens the running mean looks back"""


@dataclass(slots=True, kw_only=True)
class QualityAccount:
    """Nats by sequence, in the currency of the price list times what calibration found one of its
    nats to be worth.

    A token is answered exactly while the running mean of its sequence is above the limit: text on
    which the policy spends more than it did where it was calibrated makes it retreat until the mean
    is back. It is a function of what was asked and answered, not of time.
    """

    nats_per_price: float = 1.0
    """Measured divergence per predicted one"""
    limit: float | None = None
    """Nats per token that the running mean may reach; None: no retreat"""
    spent: float = 0.0
    """Nats, of all sequences since the account was opened"""
    tokens: int = 0
    exact_tokens: int = 0
    """Tokens of them that were answered exactly to stay below the limit"""
    prompt_spent: float = 0.0
    """Nats, of prompts that were answered lossily: apart from the rest, and no cause of retreat"""
    judged_tokens: int = 0
    """Tokens of which the loss was also measured"""
    judged_spent: float = 0.0
    """Nats that these were expected to lose, as calibrated"""
    judged_measured: float = 0.0
    """Nats that they lost"""
    _raw: float = 0.0  # of the token under way, before any correction
    _mean: np.ndarray = field(default_factory=lambda: np.zeros(0))  # by sequence
    _pending: np.ndarray = field(default_factory=lambda: np.zeros(0))
    _n_seen: int = 0

    @property
    def nats_per_token(self) -> float:
        """Expected divergence per token; 0 before the first."""
        return self.spent / self.tokens if self.tokens else 0.0

    @property
    def correction(self) -> float:
        """Factor on what answers are expected to cost from now on: what they were measured to cost
        over what they were expected to, once that is known of enough tokens. Never below 1: luck
        must not loosen a promise."""
        if self.judged_tokens < MIN_JUDGED_TOKENS or self.judged_spent <= 0:
            return 1.0
        return max(1.0, self.judged_measured / self.judged_spent)

    def judge(self, divergence: float, *, tokens: int) -> None:
        """Take in what the token under way was measured to lose in its step.

        Args:
            divergence: nats, of all its sequences together.
            tokens: sequences.
        """
        self.judged_tokens += tokens
        self.judged_spent += self._raw
        self.judged_measured += divergence

    def begin_sequences(self, count: int) -> None:
        """Forget the running means: other sequences begin."""
        self._mean, self._pending = np.zeros(count), np.zeros(count)
        self._n_seen = 0

    def begin_token(self) -> np.ndarray:
        """Close the last token and return which sequences are to be answered exactly, [B] bool."""
        if self._n_seen:
            share = 1 / min(self._n_seen, WINDOW_TOKENS)
            self._mean += share * (self._pending - self._mean)
            self._pending[:] = 0
        self._n_seen += 1
        self._raw = 0.0
        self.tokens += len(self._mean)
        if self.limit is None:
            return np.zeros(len(self._mean), dtype=bool)
        exact: np.ndarray = self._mean > self.limit
        self.exact_tokens += int(exact.sum())
        return exact

    def add_prompt(self, price: float) -> None:
        """Add what one layer's answers to a prompt's tokens are expected to cost, all together."""
        self.prompt_spent += self.nats_per_price * price

    def add(self, prices: np.ndarray) -> None:
        """Add what one layer's answers are expected to cost.

        Args:
            prices: [B] float64, of the price list.
        """
        nats = prices * self.nats_per_price
        self._raw += float(nats.sum())
        nats = nats * self.correction
        self._pending += nats
        self.spent += float(nats.sum())
