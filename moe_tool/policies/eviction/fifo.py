"""First in, first out: uses change nothing."""

from moe_tool.policies.eviction.ranked import Ranked
from moe_tool.policies.eviction.spec import EvictionSpec


class Fifo(Ranked):
    """Order of arrival over the experts of all layers."""

    _arrivals = 0

    def add(self, key: int) -> None:
        self._arrivals += 1
        self.rank(key, self._arrivals)


SPEC = EvictionSpec(name="fifo", summary="the first that entered", make=Fifo, compiled="fifo")
