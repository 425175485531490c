"""Account of the expected loss of a run, token by token, with its exact fallback."""

from dataclasses import dataclass, field

import numpy as np

WINDOW_TOKENS = 128
"""Length of the running mean in tokens, about"""


@dataclass(slots=True, kw_only=True)
class QualityAccount:
    """Expected loss in nats: prices of answers times `nats_per_price`.

    Exact fallback: a token is answered exactly while the running mean of its sequence is above the
    limit, as on text that costs more than the text of the calibration. The account depends on
    routing and answers alone, never on time.
    """

    nats_per_price: float = 1.0
    """Measured divergence per unit of price, from the calibration"""
    limit: float | None = None
    """Limit of the running mean, nats per token; None: no exact fallback"""
    spent: float = 0.0
    """Nats of all sequences since the account was opened"""
    tokens: int = 0
    exact_tokens: int = 0
    """Tokens answered by exact fallback"""
    prompt_spent: float = 0.0
    """Nats of lossily answered prompts; not part of `spent`, and no cause of exact fallback"""
    judged_tokens: int = 0
    """Tokens whose loss was also measured"""
    judged_spent: float = 0.0
    """Expected loss of the judged tokens in nats"""
    judged_measured: float = 0.0
    """Measured loss of the judged tokens in nats"""
    last_token: float = 0.0
    """Nats of the last closed token, mean of its sequences"""
    _mean: np.ndarray = field(default_factory=lambda: np.zeros(0))  # by sequence
    _pending: np.ndarray = field(default_factory=lambda: np.zeros(0))
    _n_seen: int = 0

    @property
    def nats_per_token(self) -> float:
        """Expected divergence per token; 0 before the first."""
        return self.spent / self.tokens if self.tokens else 0.0

    def judge(self, measured: float, *, expected: float, tokens: int) -> None:
        """Add the measured and the expected loss of a token, in nats over all its `tokens`
        sequences."""
        self.judged_tokens += tokens
        self.judged_spent += expected
        self.judged_measured += measured

    def begin_sequences(self, count: int) -> None:
        """Reset the running means for new sequences."""
        self._mean, self._pending = np.zeros(count), np.zeros(count)
        self._n_seen, self.last_token = 0, 0.0

    def begin_token(self) -> np.ndarray:
        """Close the last token and return the sequences under exact fallback, [B] bool."""
        if self._n_seen:
            share = 1 / min(self._n_seen, WINDOW_TOKENS)
            self._mean += share * (self._pending - self._mean)
            self.last_token = float(self._pending.mean())
            self._pending[:] = 0
        self._n_seen += 1
        self.tokens += len(self._mean)
        if self.limit is None:
            return np.zeros(len(self._mean), dtype=bool)
        exact: np.ndarray = self._mean > self.limit
        self.exact_tokens += int(exact.sum())
        return exact

    def add_prompt(self, price: float) -> None:
        """Add the summed price of one layer's answers to a prompt's tokens."""
        self.prompt_spent += self.nats_per_price * price

    def add(self, prices: np.ndarray) -> None:
        """Add the prices of one layer's answers, [B] float64."""
        nats = prices * self.nats_per_price
        self._pending += nats
        self.spent += float(nats.sum())
