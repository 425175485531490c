"""Prices that the running text corrects, and the worth of a read that keeps its loss at a target.

Both depend on routing, answers and measured losses alone, in a coarse grid of powers of two, so
that they do not depend on time or on the number of threads.
"""

import math
from collections.abc import Sequence

import numpy as np

_HALF_LIFE = 64
"""Measured tokens after which an observation counts half"""
_PRIOR, _CLASS_PRIOR, _LAYER_PRIOR = 4.0, 8.0, 16.0
"""Weight of a factor of 1, of one common to all classes and to all layers, in measured tokens"""
_GRID = 8
"""Steps of a factor within a power of two"""


class LivePrices:
    """Factors on the prices of a text's answers, by layer and class, from losses of single tokens.

    A measured loss is shared out among the layers and classes of the token's answers as their
    prices expect it. A factor is a product: of all, of a class and of a layer, each drawn to 1 as
    long as little was measured, times an upper bound of the first: one standard error more.
    """

    def __init__(self, layers: Sequence[int], n_classes: int) -> None:
        self._at = {layer: position for position, layer in enumerate(layers)}
        self._shape = (len(layers), n_classes)
        self.begin_sequence()

    def begin_sequence(self) -> None:
        """Forget every measurement, so that a text's answers do not depend on earlier texts."""
        self.n_measured = 0
        self._n = 0.0
        self._nats, self._prices = np.zeros(self._shape), np.zeros(self._shape)
        self._squares = 0.0
        self._pending = np.zeros(self._shape)
        self._factors = np.full(self._shape, _on_grid(1 + 1 / math.sqrt(_PRIOR)))

    def factors(self, layer: int) -> np.ndarray:
        """Return the factors of a layer, [C] float64."""
        row: np.ndarray = self._factors[self._at[layer]]
        return row

    @property
    def bound(self) -> float:
        """Factor on all prices, before those of classes and layers: the mean's upper bound."""
        return self._common() * (1 + self._spread())

    def begin_token(self) -> None:
        """Begin the answers of a token whose loss is going to be measured."""
        self._pending[:] = 0

    def add(self, layer: int, prices: np.ndarray) -> None:
        """Add the uncorrected prices of one layer's answers, [C] nats over all sequences."""
        self._pending[self._at[layer]] += prices

    def observe(self, nats: float, *, tokens: int) -> None:
        """Add the measured loss of the token begun last, over all its `tokens` sequences."""
        self.n_measured += tokens
        price = self._pending.sum()
        if price <= 0:
            return
        common = self._common()
        weighted = self._pending * self._factors
        decay = 0.5 ** (tokens / _HALF_LIFE)
        for kept in (self._nats, self._prices):
            kept *= decay
        self._nats += max(nats, 0.0) * weighted / weighted.sum()
        self._prices += self._pending
        self._squares = decay * self._squares + (max(nats, 0.0) - common * price) ** 2
        self._n = decay * self._n + tokens
        self._factors = self._estimate()

    def _common(self) -> float:
        """Return the measured loss over the expected one, drawn to 1."""
        price = self._prices.sum()
        ratio = self._nats.sum() / price if price > 0 else 1.0
        return float((self._n * ratio + _PRIOR) / (self._n + _PRIOR))

    def _spread(self) -> float:
        """Return the standard error of the common factor, as a share of it."""
        usual = self._common() * self._prices.sum() / self._n if self._n else 0.0
        off = self._squares / usual**2 if usual > 0 else 0.0
        return math.sqrt(off + _PRIOR) / (self._n + _PRIOR)

    def _estimate(self) -> np.ndarray:
        common, token_price = self._common(), self._prices.sum() / self._n
        usual = common * token_price  # nats of a token

        def relative(axis: int, prior: float) -> np.ndarray:
            found: np.ndarray = (self._nats.sum(axis) + prior * usual) / (
                common * self._prices.sum(axis) + prior * usual
            )
            return found

        factors = self.bound * relative(0, _CLASS_PRIOR)[None, :]
        return _on_grid(factors * relative(1, _LAYER_PRIOR)[:, None])


_DELAY_TOKENS = 16
"""Length of the mean of spent nats, in tokens"""
_STEP = 1 / 24
"""Powers of two by which the worth moves in a token, per power of two that the loss is off"""
_MOST_OFF = 2.0
_AIM = 0.8
"""Share of the limit that is aimed at, so that the exact fallback is seldom needed"""


class ReadWorth:
    """Worth of avoiding a read of 10^6 bytes, raised while a text's loss is below its target and
    lowered while it is above."""

    def __init__(self, first: float, target: float) -> None:
        """Begin with a worth in nats and a target in nats per token."""
        self._first, self._target = math.log2(first), _AIM * target
        self.begin_sequence()

    def begin_sequence(self) -> None:
        """Begin with the first worth again."""
        self._level, self._mean = self._first, self._target
        self.nats_per_mb = 2**self._first

    def settle(self, nats: float) -> None:
        """Move by the expected loss of a token that was answered lossily."""
        self._mean += (nats - self._mean) / _DELAY_TOKENS
        off = math.log2(self._target / max(self._mean, self._target / 2**_MOST_OFF))
        self._level += _STEP * max(-_MOST_OFF, off)
        self.nats_per_mb = float(2 ** (round(4 * self._level) / 4))


def _on_grid(factor: float | np.ndarray) -> np.ndarray:
    found: np.ndarray = 2 ** (np.round(_GRID * np.log2(factor)) / _GRID)
    return found


def corrected(prices: np.ndarray, factors: np.ndarray | None) -> np.ndarray:
    """Return the sum of prices [T, C] by token with the factors of a layer, [T] float64."""
    total: np.ndarray = (prices if factors is None else prices * factors).sum(axis=1)
    return total
