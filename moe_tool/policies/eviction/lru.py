"""The least recently used expert leaves first."""

from collections.abc import Container

from moe_tool.policies.eviction.protocol import ExpertKey


class Lru:
    """One recency order over the experts of all layers."""

    def __init__(self) -> None:
        self._order: dict[ExpertKey, None] = {}  # oldest use first

    def add(self, key: ExpertKey) -> None:
        """Take note of an expert that enters the cache; it counts as used."""
        assert key not in self._order, f"{key} is cached already"
        self._order[key] = None

    def touch(self, key: ExpertKey) -> None:
        """Take note of a use of a cached expert."""
        del self._order[key]
        self._order[key] = None

    def victim(self, pinned: Container[ExpertKey]) -> ExpertKey:
        """Return the expert whose last use is longest ago and that is not pinned.

        Raises:
            LookupError: every cached expert is pinned.
        """
        for key in self._order:
            if key not in pinned:
                return key
        raise LookupError("every cached expert is pinned")

    def remove(self, key: ExpertKey) -> None:
        """Take note of an expert that left the cache."""
        del self._order[key]
