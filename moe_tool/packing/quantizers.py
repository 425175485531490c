"""How an expert's matrices become codes while it is packed: `pack --quantizer`."""

from collections.abc import Mapping
from functools import cached_property, partial

import torch

from moe_tool.artifacts.pack_plan import Quantizer
from moe_tool.artifacts.precision import IntegerPrecision
from moe_tool.experts.expert_forward import inner_activations
from moe_tool.native.rounding import round_matrix
from moe_tool.packing.calibrated_layers import ExpertSample
from moe_tool.packing.expert_coding import QuantizeExpert, nearest
from moe_tool.quantization.fitted_scales import quantize_fitted
from moe_tool.quantization.gptq import ErrorSpread, error_spread, quantize_gptq
from moe_tool.quantization.hqq import quantize_hqq
from moe_tool.quantization.nested import GptqTarget, quantize_nested_gptq, with_base
from moe_tool.quantization.weights import FloatWeight, IntegerWeight

_HESSIAN_TOKENS = 8192
_LAST = "down_proj"
"""The matrix that is given what the others compute"""


def needs_inputs(name: Quantizer) -> bool:
    """Return whether a quantizer goes by what experts are given."""
    return name in ("fitted", "gptq")


def data_free(name: Quantizer) -> QuantizeExpert:
    """Return a quantizer that goes by the weights alone: the nearest to one that does not."""
    return _half_quadratic if name == "hqq" else partial(nearest, round_matrix=round_matrix)


def calibrated(name: Quantizer, sample: ExpertSample) -> QuantizeExpert:
    """Return what makes codes of one expert's matrices, with its inputs at hand.

    Args:
        name: of the quantizer.
        sample: of the expert.
    """
    if not needs_inputs(name):
        return data_free(name)
    inputs = _Calibration(sample)
    return inputs.fit if name == "fitted" else inputs.spread_errors


def last_matrix_after(
    sample: ExpertSample, weight: torch.Tensor, before: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Return the last matrix, fitted to what inexact ones before it give; see `spread_errors`.

    Args:
        sample: of the expert.
        weight: [H, I], the expert's own.
        before: the inexact matrices by name, float32.

    Returns:
        [H, I] float32, not quantized.
    """
    given = {name: FloatWeight(values=value) for name, value in before.items()}
    return _Calibration(sample).last_after(weight, given)


def _half_quadratic(
    weights: Mapping[str, torch.Tensor], precision: IntegerPrecision
) -> dict[str, IntegerWeight]:
    assert precision.zeros
    return {
        name: quantize_hqq(weight, precision.width_bits, group=precision.group)
        for name, weight in weights.items()
        if weight.dim() == 2
    }


class _Calibration:
    """What an expert's matrices are given, and what follows from it at any number of bits."""

    def __init__(self, sample: ExpertSample) -> None:
        step = max(1, -(-len(sample.fitted_on) // _HESSIAN_TOKENS))
        self._sample = sample
        self._inputs = sample.fitted_on[::step]  # [n, H]

    @cached_property
    def _inner(self) -> torch.Tensor:
        """[n, I]: what the last matrix is given by exact ones before it"""
        return self._inner_of({})

    @cached_property
    def _first_moments(self) -> torch.Tensor:
        return _second_moments(self._inputs)

    @cached_property
    def _first_spread(self) -> ErrorSpread:
        return error_spread(self._first_moments)

    @cached_property
    def _last_moments(self) -> torch.Tensor:
        return _second_moments(self._inner)

    @torch.no_grad()
    def fit(
        self, weights: Mapping[str, torch.Tensor], precision: IntegerPrecision
    ) -> dict[str, IntegerWeight]:
        """Round to nearest, with the scales that suit the inputs."""
        width, group = precision.width_bits, precision.group
        found = {}
        for name, weight in _matrices(weights):
            moments = self._last_moments if name == _LAST else self._first_moments
            coded = quantize_fitted(weight, moments, width, group=group)
            is_nested = precision.base_bits is not None
            found[name] = with_base(weight, coded, moments) if is_nested else coded
        return found

    @torch.no_grad()
    def spread_errors(
        self, weights: Mapping[str, torch.Tensor], precision: IntegerPrecision
    ) -> dict[str, IntegerWeight]:
        """GPTQ; the last matrix is fitted to what the others, as they are now, give it.

        Its target is then no longer its weights but the map that best makes the exact output of
        the inexact inner activations (as GPTAQ does for a layer, arXiv:2504.02692): a quarter of
        the divergence at one bit, a tenth at two.
        """
        width, group = precision.width_bits, precision.group
        is_nested = precision.base_bits is not None
        found: dict[str, IntegerWeight] = {}
        for name, weight in _matrices(weights):
            if name == _LAST:
                continue
            if is_nested:
                target = GptqTarget(weight=weight.float(), spread=self._first_spread)
                found[name] = quantize_nested_gptq(target, target, width, group=group)
            else:
                found[name] = quantize_gptq(weight, self._first_spread, width, group=group)
        if _LAST not in weights:
            return found
        full = self._last_target(weights[_LAST], found)
        if is_nested:
            bases = {name: coded.base for name, coded in found.items()}
            base = self._last_target(weights[_LAST], bases, order=full.spread.order)
            found[_LAST] = quantize_nested_gptq(full, base, width, group=group)
        else:
            found[_LAST] = quantize_gptq(full.weight, full.spread, width, group=group)
        return found

    @torch.no_grad()
    def last_after(self, weight: torch.Tensor, before: Mapping[str, FloatWeight]) -> torch.Tensor:
        """See `last_matrix_after`."""
        return self._last_target(weight, before).weight

    def _last_target(
        self,
        weight: torch.Tensor,
        found: Mapping[str, FloatWeight | IntegerWeight],
        *,
        order: torch.Tensor | None = None,
    ) -> GptqTarget:
        given = self._inner_of(found)  # [n, I]
        spread = error_spread(_second_moments(given), order)
        target = weight.float()
        if spread.hessian is not None:
            missing = given.T @ (self._inner - given) / max(1, len(given))  # [I, I]
            target = target + spread.solve(missing @ target.T).T
        return GptqTarget(weight=target, spread=spread)

    def _inner_of(self, found: Mapping[str, FloatWeight | IntegerWeight]) -> torch.Tensor:
        weights: dict[str, FloatWeight | IntegerWeight] = {
            name: FloatWeight(values=value) for name, value in self._sample.tensors.items()
        }
        weights.update(found)
        return inner_activations(self._sample.module, weights, self._inputs)


def _matrices(weights: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    return [(name, weight) for name, weight in weights.items() if weight.dim() == 2]


def _second_moments(inputs: torch.Tensor) -> torch.Tensor:
    """[in, in] float32, of [n, in]; zero without inputs."""
    return inputs.T @ inputs / max(1, len(inputs))
