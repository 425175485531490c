"""The experts in memory in every form that a bundle has of them: one store for each."""

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from moe_tool.artifacts.routing import PRIMARY
from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.policies.eviction.protocol import Hint
from moe_tool.progress import SILENT, Progress
from moe_tool.quantization.weights import ExpertWeights
from moe_tool.store.channel_store import ChannelStore
from moe_tool.store.expert_store import ExpertStore
from moe_tool.store.mixed_store import MixedStore


class ExpertLevels:
    """Stores by level; an expert at a level is numbered level * E + expert.

    Each level has slots, pins and readers of its own, so that what is read at one precision never
    displaces what is held at another.
    """

    def __init__(
        self,
        stores: Sequence[ExpertStore | MixedStore | ChannelStore | None],
        *,
        n_experts: int,
    ) -> None:
        """Take the stores over.

        Args:
            stores: by level, PRIMARY first; None: nothing of that form is in memory or will be.
            n_experts: E.
        """
        full = stores[PRIMARY]
        assert full is not None
        self.full: ExpertStore | MixedStore | ChannelStore = full
        self._stores = tuple(stores)
        self._n_experts = n_experts
        self._none = np.zeros(n_experts, dtype=bool)

    @property
    def n_numbers(self) -> int:
        """Experts of a layer in all forms."""
        return len(self._stores) * self._n_experts

    @property
    def hints(self) -> frozenset[Hint]:
        """What the eviction policy of the full experts wants to be told."""
        return self.full.hints

    def resident(self, layer: int) -> np.ndarray:
        """Return what of a layer is in memory now, [L, E] bool."""
        return np.stack(
            [self._none if store is None else store.resident(layer) for store in self._stores]
        )

    def pinned_mask(self, layer: int) -> np.ndarray:
        """Return what of a layer never leaves, [L, E] bool."""
        return np.stack(
            [self._none if store is None else store.pinned_mask(layer) for store in self._stores]
        )

    def load_pinned(self, progress: Progress = SILENT) -> None:
        """Read what never leaves; see ExpertStore."""
        for store in self._stores:
            if store is not None:
                store.load_pinned(progress)

    def acquire(
        self,
        layer: int,
        numbers: Sequence[int],
        counters: PhaseCounters,
        *,
        scores: np.ndarray | None = None,
    ) -> Iterator[tuple[int, ExpertWeights]]:
        """Yield each of the numbered experts with its weights; see ExpertStore.

        The reads of all levels begin at once; cheap forms, which are mostly there, come first.
        """
        by_level: dict[int, list[int]] = {}
        for number in numbers:
            level, expert = divmod(number, self._n_experts)
            by_level.setdefault(level, []).append(expert)
        if by_level.keys() <= {PRIMARY}:
            return self.full.acquire(layer, numbers, counters, scores=scores)
        supplies = []
        for level in sorted(by_level):
            store = self._stores[level]
            assert store is not None, "a policy named a form that is not held"
            given = scores if level == PRIMARY else None
            supply = store.acquire(layer, by_level[level], counters, scores=given)
            supplies.append(_numbered(supply, level * self._n_experts))
        return chain.from_iterable(reversed(supplies))

    def close(self) -> None:
        """Close all stores."""
        for store in self._stores:
            if store is not None:
                store.close()


def _numbered(
    supply: Iterator[tuple[int, ExpertWeights]], first: int
) -> Iterator[tuple[int, ExpertWeights]]:
    for expert, weights in supply:
        yield first + expert, weights
