"""Evict the expert whose next use is expected last, by recency and the order of layers."""

from moe_tool.policies.eviction.protocol import CacheShape
from moe_tool.policies.eviction.ranked import Ranked
from moe_tool.policies.eviction.spec import EvictionSpec
from moe_tool.policies.parameters import whole_number


class LayerLru(Ranked):
    """An expert's next use is expected at its layer's next call, later by a share of a forward for
    every forward without use.

    Layers are called in a cycle, so that plain LRU evicts what is wanted next once the cache holds
    less than one token's experts. This policy evicts from the layer that was just called.
    """

    def __init__(self, shape: CacheShape, *, age: int = 25) -> None:
        super().__init__(shape)
        self._age = age

    def touch(self, key: int) -> None:
        self.rank(key, self._age * self.shape.n_layers * self.forward)

    add = touch

    def begin_call(self, layer: int) -> None:
        super().begin_call(layer)
        self.layer_ranks = -100 * self.turns_until()


SPEC = EvictionSpec(
    name="layer-lru",
    summary="those whose layer's next call is farthest ahead, plus a share of a round for every "
    "forward without use",
    make=LayerLru,
    parameters={
        "age": whole_number("share of a round that a forward without use adds, percent", default=25)
    },
    compiled="layer-lru",
)
