"""Experts whose own records have several sizes, as one store: a pool of slots for each size."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import numpy as np

from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.policies.eviction.protocol import Hint
from moe_tool.progress import SILENT, Progress
from moe_tool.quantization.weights import ExpertWeights
from moe_tool.store.expert_store import ExpertStore


class MixedStore:
    """Hands every expert to the store that holds records of its size; see ExpertStore."""

    def __init__(
        self, stores: Sequence[ExpertStore], store_of: Mapping[int, Sequence[int | None]]
    ) -> None:
        """Take the stores over.

        Args:
            stores: by record size.
            store_of: layer -> which of them holds each expert, [E]; None: the expert is absent.
        """
        self._stores = tuple(stores)
        self._store_of = store_of

    def resident(self, layer: int) -> np.ndarray:
        """Return which experts of a layer are in memory now, [E] bool."""
        found: np.ndarray = np.logical_or.reduce([s.resident(layer) for s in self._stores])
        return found

    def pinned_mask(self, layer: int) -> np.ndarray:
        """Return which experts of a layer never leave, [E] bool."""
        found: np.ndarray = np.logical_or.reduce([s.pinned_mask(layer) for s in self._stores])
        return found

    @property
    def hints(self) -> frozenset[Hint]:
        """What the eviction policy wants to be told."""
        return self._stores[0].hints

    def load_pinned(self, progress: Progress = SILENT) -> None:
        """Read what never leaves."""
        for store in self._stores:
            store.load_pinned(progress)

    def acquire(
        self,
        layer: int,
        experts: Sequence[int],
        counters: PhaseCounters,
        *,
        scores: np.ndarray | None = None,
    ) -> Iterator[tuple[int, ExpertWeights]]:
        """Yield each expert with its weights. The reads of all sizes begin at once."""
        parts = self._split(layer, experts)
        # All are called: each judges what it read ahead by what this call names of it.
        supplies = [
            store.acquire(layer, part, counters, scores=scores)
            for store, part in zip(self._stores, parts, strict=True)
        ]
        return chain.from_iterable(supplies)

    def prefetch(
        self, layer: int, experts: Sequence[int], *, spare: Sequence[int], counters: PhaseCounters
    ) -> None:
        """Expect experts to be named by the next call, and read them when there is time."""
        parts, spared = self._split(layer, experts), self._split(layer, spare)
        for store, part, kept in zip(self._stores, parts, spared, strict=True):
            if part:
                store.prefetch(layer, part, spare=kept, counters=counters)

    def expect(self, layer: int, experts: Sequence[int], *, ahead: int) -> None:
        """Tell the eviction policies what a call to come is predicted to name."""
        for store, part in zip(self._stores, self._split(layer, experts), strict=True):
            store.expect(layer, part, ahead=ahead)

    def close(self) -> None:
        """Close all stores."""
        for store in self._stores:
            store.close()

    def _split(self, layer: int, experts: Sequence[int]) -> list[list[int]]:
        """By store, in their order; absent experts are in none."""
        parts: list[list[int]] = [[] for _ in self._stores]
        for expert in experts:
            at = self._store_of[layer][expert]
            if at is not None:
                parts[at].append(expert)
        return parts
