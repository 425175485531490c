"""Watch over the routing of running text: is it unlike that of the profile's text?"""

import numpy as np
import torch

from moe_tool.artifacts.routing_norm import (
    CHECKED_TOKENS,
    WINDOW_TOKENS,
    RoutingNorm,
    window_score,
)
from moe_tool.artifacts.run_result import DriftSeen

_HALF_TOKENS = CHECKED_TOKENS[0]
_LIMIT = float(torch.finfo(torch.float16).max)


class DriftWatch:
    """Verdicts on windows of 64 tokens of each sequence, one after the other, prompt included.

    A window is scored after 32 and after 64 tokens. A sequence drifts from the first score above
    its threshold until a whole window has none. Logits are rounded to float16, as in a profile, and
    their float64 sums over a window are exact: verdicts do not depend on how tokens are divided
    into forwards, nor on the number of threads.
    """

    def __init__(self, norm: RoutingNorm) -> None:
        """Begin without any sequence."""
        self._score = window_score(norm)
        self._thresholds = norm.thresholds
        self._domains = norm.domains
        self._experts = {
            layer.layer: np.array(layer.experts, dtype=np.int64) for layer in norm.layers
        }
        ends = np.cumsum([len(layer.experts) for layer in norm.layers]).tolist()
        self._columns = {
            layer.layer: slice(end - len(layer.experts), end)
            for layer, end in zip(norm.layers, ends, strict=True)
        }
        self._n_values = ends[-1]
        self._was_noted = False
        self._begin(0)

    def _begin(self, count: int) -> None:
        self.tokens = np.zeros(count, np.int64)
        """[B]: tokens seen of each sequence, without padding"""
        self.drifting = np.zeros(count, bool)
        """[B]: sequences that are routed unlike the profile's text"""
        self.score = np.zeros(count)
        """[B]: last score of each sequence over its threshold; above 1 is an alarm"""
        self.windows = 0
        """Windows of all sequences with at least one score"""
        self.alarms = 0
        """Windows of all sequences with a score above its threshold"""
        self.first_at: int | None = None
        """Tokens of its sequence that the first alarm needed"""
        self._is_alarmed = np.zeros(count, bool)  # in the current window
        self._before = np.zeros((count, self._n_values))  # sum of the window's first half
        self._now = np.zeros((count, self._n_values))  # sum of the half under way
        self._sums = np.zeros((count, 1, self._n_values))  # of the forward, by half
        self._place = np.zeros((count, 0), np.int64)
        self._is_counted = np.zeros((count, 0), bool)
        self._is_one_token = False
        self._layers_seen: set[int] = set()

    @property
    def is_drifting(self) -> bool:
        """Whether any sequence is routed unlike the profile's text now."""
        return bool(self.drifting.any())

    def begin_forward(
        self,
        n_sequences: int,
        n_new: int,
        *,
        mask: torch.Tensor | None = None,
        is_first: bool,
    ) -> None:
        """Prepare for a forward.

        Args:
            n_sequences: B.
            n_new: tokens of each sequence in the forward.
            mask: [B, at least n_new], 0 for padding; other shapes are ignored.
            is_first: whether new sequences begin, which forgets the old ones.
        """
        if is_first or n_sequences != len(self.tokens):
            self._begin(n_sequences)
        self._is_counted = np.ones((n_sequences, n_new), bool)
        if mask is not None and _fits(mask.shape, n_sequences, n_new):
            self._is_counted = mask[:, -n_new:].numpy() != 0
        begun = self.tokens % _HALF_TOKENS
        ordinal = begun[:, None] + np.cumsum(self._is_counted, axis=1) - 1
        self._is_one_token = n_new == 1 and bool(self._is_counted.all())
        self._place = np.maximum(ordinal, 0) // _HALF_TOKENS  # [B, n], half of the forward
        self._sums = np.zeros((n_sequences, int(self._place.max()) + 1, self._n_values))
        self._sums[:, 0] = self._now
        self._layers_seen = set()

    def add(self, layer: int, logits: torch.Tensor) -> None:
        """Add one layer's router logits [B * n, E] of the forward's tokens."""
        if layer not in self._columns or len(logits) != self._is_counted.size:
            return
        chosen = logits.detach().float().numpy()[:, self._experts[layer]]
        values = chosen.clip(-_LIMIT, _LIMIT).astype(np.float16).astype(np.float64)  # [B * n, F]
        sums = self._sums[..., self._columns[layer]]
        if self._is_one_token:
            sums[:, 0] += values
        else:
            counted = self._is_counted.reshape(-1)
            rows = np.nonzero(self._is_counted)[0]
            np.add.at(sums, (rows, self._place.reshape(-1)[counted]), values[counted])
        self._layers_seen.add(layer)

    def end_forward(self) -> str | None:
        """Judge what the forward completed; return a note at the first alarm of this watch."""
        if len(self._layers_seen) < len(self._columns):
            return None  # a router was not seen: no verdict is better than a wrong one
        before = self.tokens
        self.tokens = before + self._is_counted.sum(axis=1)
        first, last = before // _HALF_TOKENS, self.tokens // _HALF_TOKENS  # halves completed
        for index in range(int((last - first).max(initial=0))):
            self._complete(np.flatnonzero(first + index < last), first + index, index)
        spare = np.minimum(last - first, self._sums.shape[1] - 1)
        self._now = self._sums[np.arange(len(spare)), spare].copy()
        self._now[self.tokens % _HALF_TOKENS == 0] = 0
        self._layers_seen = set()
        if self._was_noted or self.first_at is None:
            return None
        self._was_noted = True
        return (
            f"this text is routed unlike the profile's ({', '.join(self._domains)}), noticed after "
            f"{self.first_at} tokens: expected losses do not hold for it"
        )

    def _complete(self, rows: np.ndarray, halves: np.ndarray, index: int) -> None:
        """Score the given sequences after their `index`th half of this forward."""
        is_second = halves[rows] % 2 == 1
        for check, at in ((0, rows[~is_second]), (1, rows[is_second])):
            if not len(at):
                continue
            sums = self._sums[at, index] + (self._before[at] if check else 0.0)
            ratio = self._score.rate(sums / CHECKED_TOKENS[check]) / self._thresholds[check]
            is_new = (ratio > 1) & ~self._is_alarmed[at]
            self.score[at] = ratio
            self.alarms += int(is_new.sum())
            if is_new.any() and self.first_at is None:
                self.first_at = int((halves[at][is_new].min() + 1) * _HALF_TOKENS)
            self._is_alarmed[at] |= ratio > 1
            self.drifting[at] |= self._is_alarmed[at]
            if check:
                self.drifting[at] = self._is_alarmed[at]
                self._is_alarmed[at] = False
                self._before[at] = 0
            else:
                self.windows += len(at)
                self._before[at] = self._sums[at, index]

    def seen(self) -> DriftSeen:
        """Return what was seen of the current sequences."""
        return DriftSeen(
            window_tokens=WINDOW_TOKENS,
            windows=self.windows,
            alarms=self.alarms,
            first_alarm_tokens=self.first_at,
            is_drifting=self.is_drifting,
            score=float(self.score.max(initial=0.0)),
        )


def _fits(shape: torch.Size, n_sequences: int, n_new: int) -> bool:
    return len(shape) == 2 and shape[0] == n_sequences and shape[1] >= n_new
