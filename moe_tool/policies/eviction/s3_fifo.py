"""S3-FIFO: a small queue for new experts, a main queue, and a ghost queue of experts evicted from
the small one (Yang et al., SOSP 2023)."""

from collections.abc import Collection

from moe_tool.policies.eviction.protocol import CacheShape, Eviction
from moe_tool.policies.eviction.spec import EvictionSpec
from moe_tool.policies.parameters import whole_number

_MAX_USES = 3


class S3Fifo(Eviction):
    """A new expert enters the small queue, a tenth of the cache, and moves to the main queue if it
    was used again by the time it would leave. Ghost-queue hits enter the main queue."""

    def __init__(self, shape: CacheShape, *, small: int = 10) -> None:
        self._n_small = max(1, shape.capacity * small // 100)
        self._n_ghosts = max(1, shape.capacity - self._n_small)
        self._uses: dict[int, int] = {}  # uses of cached experts since they entered their queue
        self._small: dict[int, None] = {}  # all queues: oldest first
        self._main: dict[int, None] = {}
        self._ghosts: dict[int, None] = {}

    def touch(self, key: int) -> None:
        self._uses[key] = min(self._uses[key] + 1, _MAX_USES)

    def add(self, key: int) -> None:
        self._uses[key] = 0
        if key in self._ghosts:
            del self._ghosts[key]
            self._main[key] = None
        else:
            self._small[key] = None

    def evict(self, protected: Collection[int]) -> int:
        """See `Eviction`. Protected experts met on the way go to the end of the main queue."""
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
        del self._uses[key]
        self._small.pop(key, None)
        self._main.pop(key, None)


def _pop(queue: dict[int, None]) -> int:
    key = next(iter(queue))
    del queue[key]
    return key


SPEC = EvictionSpec(
    name="s3-fifo",
    summary="those used once: three queues",
    make=S3Fifo,
    parameters={"small": whole_number("the small queue's part of the cache, percent", default=10)},
    source="Yang et al., SOSP 2023",
    compiled="s3-fifo",
)
