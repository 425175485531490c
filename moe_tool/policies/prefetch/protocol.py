"""Predictions of coming layers' experts, and the prefetches chosen from them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

Input = TypeVar("Input", contravariant=True)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prediction:
    """Experts that the next call of one layer is predicted to want, in full or as answers."""

    layer: int
    """Decoder layer"""
    index: np.ndarray
    """Experts of each token, [T, K] int64, of answers their `FormIds` numbers; ids outside the
    valid ones mean no expert"""
    weight: np.ndarray
    """Gate weights, [T, K]"""


class Predictor(Protocol[Input]):
    """Source of predictions from what is known at a layer call."""

    def predict(self, at: Input) -> Iterator[Prediction]:
        """Yield the predictions of the layers after a call lazily, the nearest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPrefetch:
    """Prefetch chosen for one coming layer."""

    layer: int
    """Decoder layer"""
    experts: list[int]
    """Missing experts to read, by `FormIds` number, the most wanted first"""
    spare: list[int]
    """Predicted ones, which stay if they are resident"""
