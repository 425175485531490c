"""Recorder of the layer calls of a run, for the simulator."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from moe_tool.artifacts.expert_ids import LayerIds
from moe_tool.artifacts.run_trace import RecordedCalls


@dataclass(slots=True, kw_only=True)
class CallRecorder:
    """Layer calls recorded so far; grows by every call."""

    ids: LayerIds
    """Numbers of the model's experts"""
    n_calls_before: int = 0
    """Calls recorded before the current run"""
    _layer: list[int] = field(default_factory=list)
    _is_decode: list[bool] = field(default_factory=list)
    _keys: list[list[int]] = field(default_factory=list)
    _guesses: list[list[int]] = field(default_factory=list)
    _scores: list[np.ndarray | None] = field(default_factory=list)

    def record(
        self,
        layer: int,
        experts: Sequence[int],
        *,
        is_decode: bool,
        scores: np.ndarray | None,
        guesses: Sequence[tuple[int, int]],
    ) -> None:
        """Record one call: the experts requested from the store, ascending, the `gate_scores` [E],
        and (layer, expert) predicted for the next layers."""
        self._layer.append(self.ids.position[layer])
        self._is_decode.append(is_decode)
        self._keys.append([self.ids.number((layer, expert)) for expert in experts])
        self._guesses.append([self.ids.number(guess) for guess in guesses])
        self._scores.append(scores)

    def add_guesses(self, guesses: Sequence[tuple[int, int]]) -> None:
        """Add (layer, expert) predicted during the latest call, after it was recorded."""
        self._guesses[-1] += [self.ids.number(guess) for guess in guesses]

    def begin_run(self) -> None:
        """Mark the beginning of a run: its counters start at zero."""
        self.n_calls_before = len(self._layer)

    def recorded(self) -> RecordedCalls:
        """Return the calls so far."""
        known = [scores for scores in self._scores if scores is not None]
        return RecordedCalls(
            layer=np.array(self._layer, np.int32),
            is_decode=np.array(self._is_decode, np.bool_),
            start=_starts(self._keys),
            keys=_flat(self._keys),
            guess_start=_starts(self._guesses),
            guesses=_flat(self._guesses),
            scores=np.stack(known) if known and len(known) == len(self._scores) else None,
        )


def _starts(rows: list[list[int]]) -> np.ndarray:
    return np.cumsum([0, *map(len, rows)]).astype(np.int64)


def _flat(rows: list[list[int]]) -> np.ndarray:
    return np.array([key for row in rows for key in row], np.int32)
