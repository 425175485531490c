"""Keys of experts, and their codec to flat numbers."""

from collections.abc import Sequence

ExpertKey = tuple[int, int]
"""Key of an expert: (decoder layer, expert)"""


class LayerIds:
    """Codec from a model's (layer, expert) pairs to flat numbers, E per MoE layer."""

    def __init__(self, layers: Sequence[int], n_experts: int) -> None:
        """Number the experts of decoder layers, ascending."""
        self.position = {layer: at for at, layer in enumerate(layers)}
        """Decoder layer -> its position among the MoE layers"""
        self._first = {layer: at * n_experts for layer, at in self.position.items()}
        self._keys = [(layer, expert) for layer in layers for expert in range(n_experts)]

    def number(self, key: ExpertKey) -> int:
        """Return an expert's flat number."""
        return self._first[key[0]] + key[1]

    def key(self, number: int) -> ExpertKey:
        """Return (decoder layer, expert) of a flat number."""
        return self._keys[number]
