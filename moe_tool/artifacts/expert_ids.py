"""Keys of experts, and the only codec between pairs of numbers and one flat number."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Number = TypeVar("Number", int, np.ndarray)

ExpertKey = tuple[int, int]
"""Key of an expert: (decoder layer, expert)"""


class FormIds:
    """Codec from one layer's (form, expert) pairs to flat numbers, E per form."""

    def __init__(self, n_experts: int) -> None:
        """Number the forms of E experts."""
        self._n_experts = n_experts

    def number(self, form: Number, expert: Number) -> Number:
        """Return the flat number of an expert in a form; of arrays elementwise."""
        found: Number = form * self._n_experts + expert
        return found

    def pair(self, number: int) -> tuple[int, int]:
        """Return (form, expert) of a flat number."""
        return divmod(number, self._n_experts)


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
