"""What the store asks of an eviction policy."""

from collections.abc import Container
from typing import Protocol

ExpertKey = tuple[int, int]
"""(layer, expert)"""


class Eviction(Protocol):
    """Keeps the order in which cached experts are given up.

    The policy is told what enters and leaves the cache; how much the cache holds is the store's
    affair. The same calls give the same victims: no clock, no random numbers.
    """

    def add(self, key: ExpertKey) -> None:
        """Take note of an expert that enters the cache; it counts as used."""

    def touch(self, key: ExpertKey) -> None:
        """Take note of a use of a cached expert."""

    def victim(self, pinned: Container[ExpertKey]) -> ExpertKey:
        """Return the cached expert to give up first, none of `pinned`; it stays until `remove`.

        Raises:
            LookupError: every cached expert is pinned.
        """

    def remove(self, key: ExpertKey) -> None:
        """Take note of an expert that left the cache."""
