"""GPTQ: each column's error compensated in the remaining columns, and in the last matrix."""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from moe_tool.artifacts.precision import IntegerPrecision
from moe_tool.quantizers.spec import QuantizeExpert, QuantizerSpec, output_error

if TYPE_CHECKING:
    import torch

    from moe_tool.quantization.gptq import ErrorSpread
    from moe_tool.quantization.nested import GptqTarget
    from moe_tool.quantization.weights import FloatWeight, IntegerWeight
    from moe_tool.quantizers.inputs import ExpertInputs


def _make(inputs: "ExpertInputs | None") -> QuantizeExpert:
    assert inputs is not None
    return _Gptq(inputs).quantize


class _Gptq:
    """GPTQ of one expert at any number of bits."""

    def __init__(self, inputs: "ExpertInputs") -> None:
        self._inputs = inputs

    def quantize(
        self, weights: "Mapping[str, torch.Tensor]", precision: IntegerPrecision
    ) -> "dict[str, IntegerWeight]":
        """Return GPTQ's codes; the last matrix is fitted to the quantized matrices before it.

        Its target is the map that best makes the exact output from the inexact inner activations
        (as GPTAQ does for a layer, arXiv:2504.02692), instead of its weights. That saves a quarter
        of the divergence at one bit, a tenth at two.
        """
        from moe_tool.quantization.nested import GptqTarget
        from moe_tool.quantizers.inputs import LAST, matrices

        found: dict[str, IntegerWeight] = {}
        for name, weight in matrices(weights):
            if name != LAST:
                target = GptqTarget(weight=weight.float(), spread=self._first_spread)
                found[name] = _codes(target, target, precision)
        if LAST not in weights:
            return found
        full = base = _last_target(self._inputs, weights[LAST], found)
        if precision.base_bits is not None:
            bases = {name: coded.base for name, coded in found.items()}
            base = _last_target(self._inputs, weights[LAST], bases, order=full.spread.order)
        found[LAST] = _codes(full, base, precision)
        return found

    @cached_property
    def _first_spread(self) -> "ErrorSpread":
        """Error spread of the matrices before the last, which share their inputs"""
        from moe_tool.quantization.gptq import error_spread

        return error_spread(self._inputs.first_moments)


def _codes(full: "GptqTarget", base: "GptqTarget", precision: IntegerPrecision) -> "IntegerWeight":
    from moe_tool.quantization.gptq import quantize_gptq
    from moe_tool.quantization.nested import quantize_nested_gptq

    width, group = precision.width_bits, precision.group
    if precision.base_bits is not None:
        return quantize_nested_gptq(full, base, width, group=group)
    return quantize_gptq(full.weight, full.spread, width, group=group)


def _last_target(
    inputs: "ExpertInputs",
    weight: "torch.Tensor",
    found: "Mapping[str, FloatWeight | IntegerWeight]",
    *,
    order: "torch.Tensor | None" = None,
) -> "GptqTarget":
    from moe_tool.quantization.gptq import error_spread
    from moe_tool.quantization.nested import GptqTarget
    from moe_tool.quantizers.inputs import second_moments

    given = inputs.inner_of(found)  # [n, I]
    spread = error_spread(second_moments(given), order)
    target = weight.float()
    if spread.hessian is not None:
        missing = given.T @ (inputs.exact_inner - given) / max(1, len(given))  # [I, I]
        target = target + spread.solve(missing @ target.T).T
    return GptqTarget(weight=target, spread=spread)


SPEC = QuantizerSpec(
    name="gptq",
    summary="each column's error compensated in the remaining columns, scales by least squares on "
    "the outputs",
    make=_make,
    objective=output_error,
    needs_inputs=True,
    refit_last=lambda inputs, last, before: _last_target(inputs, last, before).weight,
    source="arXiv:2210.17323",
)
