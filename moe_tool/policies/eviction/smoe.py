"""Evict the expert with the lowest moving-average gate score: arXiv:2508.18983, SMoE."""

import numpy as np

from moe_tool.policies.eviction.protocol import CacheShape
from moe_tool.policies.eviction.ranked import Ranked
from moe_tool.policies.eviction.spec import EvictionSpec
from moe_tool.policies.parameters import whole_number

SCORE_ONE = 2**15
"""Score that stands for a probability of 1"""
_MEAN_BITS = 8


class Smoe(Ranked):
    """Mean gate score of each expert, chosen or not, over its layer's last calls."""

    hints = frozenset({"scores"})

    def __init__(self, shape: CacheShape, *, window: int = 16) -> None:
        super().__init__(shape)
        self._window = window
        self._scores: dict[int, np.ndarray] = {}
        """Layer -> [window, E] uint16; only layers that were called, since with `per-layer` a
        policy sees one alone"""
        self._calls = np.zeros(shape.n_layers, dtype=np.int64)
        self._means = np.zeros((shape.n_layers, shape.n_experts), dtype=np.int64)

    def observe(self, layer: int, scores: np.ndarray) -> None:
        seen = self._scores.get(layer)
        if seen is None:
            seen = np.zeros((self._window, self.shape.n_experts), dtype=np.uint16)
            self._scores[layer] = seen
        seen[self._calls[layer] % self._window] = scores
        self._calls[layer] += 1
        n_seen = min(int(self._calls[layer]), self._window)
        self._means[layer] = (seen.sum(axis=0, dtype=np.int64) << _MEAN_BITS) // n_seen
        self.rank_layer(layer, self._means[layer])

    def touch(self, key: int) -> None:
        self.rank(key, int(self._means.reshape(-1)[key]))

    add = touch


def gate_scores(logits: np.ndarray) -> np.ndarray:
    """Return the gate scores of a call, [E] uint16 of 0..SCORE_ONE: the softmax of the router
    logits [T, E] float16, averaged over tokens."""
    wide = logits.astype(np.float64)
    odds = np.exp(wide - wide.max(axis=-1, keepdims=True))
    shares = odds / odds.sum(axis=-1, keepdims=True)
    scores: np.ndarray = np.rint(shares.mean(axis=-2) * SCORE_ONE).astype(np.uint16)
    return scores


SPEC = EvictionSpec(
    name="smoe",
    summary="the least recent mean gate score",
    make=Smoe,
    parameters={"window": whole_number("calls of the layer in the mean", default=16, most=1024)},
    source="arXiv:2508.18983",
    compiled="smoe",
    notes_bytes=lambda parameters: 2 * parameters["window"],  # uint16 scores
)
