"""Three queues: a small one for what may be used once, a main one, and the names of what left the
small one (Yang et al., SOSP 2023)."""

from collections.abc import Collection, Sequence
from typing import ClassVar

import numpy as np

from moe_tool.policies.eviction.protocol import CacheShape, Hint

_MAX_USES = 3


class S3Fifo:
    """A newcomer enters the small queue, a tenth of the cache, and moves to the main one if it was
    used again by the time it would leave. Who comes back soon after it left enters the main one."""

    hints: ClassVar[frozenset[Hint]] = frozenset()

    def __init__(self, shape: CacheShape, *, small: int = 10) -> None:
        """Begin with an empty cache.

        Args:
            shape: of the cache.
            small: the small queue's part of it, in percent.
        """
        self._n_small = max(1, shape.capacity * small // 100)
        self._n_ghosts = max(1, shape.capacity - self._n_small)
        self._uses: dict[int, int] = {}  # of cached experts, since they entered their queue
        self._small: dict[int, None] = {}  # oldest first, as the others
        self._main: dict[int, None] = {}
        self._ghosts: dict[int, None] = {}

    def begin_call(self, layer: int) -> None:
        """Layers are all one to it."""

    def touch(self, key: int) -> None:
        """See `Eviction`."""
        self._uses[key] = min(self._uses[key] + 1, _MAX_USES)

    def add(self, key: int) -> None:
        """See `Eviction`."""
        self._uses[key] = 0
        if key in self._ghosts:
            del self._ghosts[key]
            self._main[key] = None
        else:
            self._small[key] = None

    def evict(self, protected: Collection[int]) -> int:
        """See `Eviction`. Protected experts that are met go to the end of the main queue."""
        if len(self._uses) <= len(protected) and all(key in protected for key in self._uses):
            raise LookupError("every cached expert is protected")
        skipped = 0
        while True:
            is_main_held = bool(self._small) and skipped >= len(self._main)
            if len(self._small) > self._n_small or is_main_held:
                key = _pop(self._small)
                if key not in protected and self._uses[key] == 0:
                    self._ghosts[key] = None
                    if len(self._ghosts) > self._n_ghosts:
                        _pop(self._ghosts)
                    break
                self._uses[key] = 0
            else:
                key = _pop(self._main)
                if key not in protected:
                    if self._uses[key] == 0:
                        break
                    self._uses[key] -= 1
                else:
                    skipped += 1
            self._main[key] = None
        del self._uses[key]
        return key

    def discard(self, key: int) -> None:
        """See `Eviction`."""
        del self._uses[key]
        self._small.pop(key, None)
        self._main.pop(key, None)

    def observe(self, layer: int, scores: np.ndarray) -> None:
        """Nothing follows from scores."""

    def expect(self, keys: Sequence[int], *, ahead: int) -> None:
        """Nothing follows from predictions."""


def _pop(queue: dict[int, None]) -> int:
    key = next(iter(queue))
    del queue[key]
    return key
