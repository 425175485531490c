"""Description of a quantizer: name, help, needs, abilities.

This file and the registry do not load torch, so that --help can list the quantizers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from moe_tool.artifacts.precision import IntegerPrecision

if TYPE_CHECKING:
    import torch

    from moe_tool.quantization.weights import FloatWeight, IntegerWeight
    from moe_tool.quantizers.inputs import ExpertInputs

QuantizeExpert = Callable[
    [Mapping[str, "torch.Tensor"], IntegerPrecision], Mapping[str, "IntegerWeight"]
]
"""Function from an expert's tensors and a precision to the codes of its matrices"""
RefitLast = Callable[
    ["ExpertInputs", "torch.Tensor", Mapping[str, "FloatWeight | IntegerWeight"]], "torch.Tensor"
]
"""Function from inputs, the last matrix and inexact ones before it to the last matrix that
compensates their errors, [H, I] float32"""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizerSpec:
    """Description of one quantizer."""

    name: str
    summary: str
    """How codes and scales are chosen"""
    needs_inputs: bool = False
    """Whether the quantizer needs the experts' inputs on a profile's tokens"""
    is_profiled: bool = False
    """Whether profiles hold its errors at every width; otherwise `plan` measures them"""
    makes_zeros: bool = False
    """Whether scales have zero points, which rule out nested bits; otherwise grids are symmetric"""
    source: str = ""
    """Paper of the rule"""

    def make(self, inputs: "ExpertInputs | None") -> QuantizeExpert:
        """Return the quantizer of an expert with these inputs, None only without `needs_inputs`."""
        found: QuantizeExpert = self._module.make(inputs)
        return found

    @property
    def refit_last(self) -> RefitLast | None:
        """Function that compensates earlier errors in the last matrix; None: nothing does"""
        return getattr(self._module, "refit_last", None)

    @property
    def _module(self) -> ModuleType:
        return import_module(f"moe_tool.quantizers.{self.name}")
