"""Inputs of one expert's matrices on a profile's tokens."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch

from moe_tool.artifacts.precision import IntegerPrecision
from moe_tool.experts.expert_forward import inner_activations
from moe_tool.quantization.nested import with_base
from moe_tool.quantization.weights import FloatWeight, IntegerWeight
from moe_tool.quantizers.spec import QuantizeExpert

LAST = "down_proj"
"""Last matrix, whose inputs the others compute"""
_MOST_TOKENS = 8192
RoundByMoments = Callable[[torch.Tensor, torch.Tensor, IntegerPrecision], IntegerWeight]
"""Function from a matrix, its inputs' second moments and a precision to codes"""


class ExpertInputs:
    """Inputs of one expert with their statistics, shared by all numbers of bits."""

    def __init__(
        self, module: Any, tensors: Mapping[str, torch.Tensor], tokens: torch.Tensor
    ) -> None:
        """Keep the inputs [n, H] float32 of an exact expert, evenly thinned to _MOST_TOKENS."""
        step = max(1, -(-len(tokens) // _MOST_TOKENS))
        self._module = module
        self._tensors = tensors
        self._tokens = tokens[::step]

    @cached_property
    def exact_inner(self) -> torch.Tensor:
        """[n, I] float32: inputs of the last matrix in the exact expert"""
        return self.inner_of({})

    @cached_property
    def first_moments(self) -> torch.Tensor:
        """[in, in] float32: second moments of the inputs of all matrices but the last"""
        return second_moments(self._tokens)

    @cached_property
    def _last_moments(self) -> torch.Tensor:
        return second_moments(self.exact_inner)

    def moments(self, name: str) -> torch.Tensor:
        """Return the second moments of a matrix's inputs in the exact expert, [in, in] float32."""
        return self._last_moments if name == LAST else self.first_moments

    @torch.no_grad()
    def inner_of(self, found: Mapping[str, FloatWeight | IntegerWeight]) -> torch.Tensor:
        """Return the inputs of the last matrix if `found` replace exact tensors, [n, I] float32."""
        weights: dict[str, FloatWeight | IntegerWeight] = {
            name: FloatWeight(values=value) for name, value in self._tensors.items()
        }
        weights.update(found)
        return inner_activations(self._module, weights, self._tokens)


def second_moments(inputs: torch.Tensor) -> torch.Tensor:
    """Return the mean of x x^T, [in, in] float32, of [n, in]; zero without inputs."""
    return inputs.T @ inputs / max(1, len(inputs))


def matrices(weights: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """Return an expert's matrices by name, without its vectors."""
    return [(name, weight) for name, weight in weights.items() if weight.dim() == 2]


def by_moments(inputs: ExpertInputs, round_matrix: RoundByMoments) -> QuantizeExpert:
    """Return a quantizer that rounds each matrix by its own inputs, nested bits included."""

    def quantize(
        weights: Mapping[str, torch.Tensor], precision: IntegerPrecision
    ) -> dict[str, IntegerWeight]:
        found = {}
        for name, weight in matrices(weights):
            moments = inputs.moments(name)
            coded = round_matrix(weight, moments, precision)
            is_nested = precision.base_bits is not None
            found[name] = with_base(weight, coded, moments) if is_nested else coded
        return found

    return quantize
