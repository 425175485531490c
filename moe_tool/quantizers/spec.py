"""Description of a quantizer in its own file: name, help, needs, abilities.

Neither this file nor the registry loads torch, so that --help can list the quantizers: their files
import it where they compute.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
Objective = Callable[["torch.Tensor", "torch.Tensor"], float]
"""Function from a matrix's error, [out, in], and the second moments of its inputs, [in, in], to the
quantity that the quantizer minimises"""
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
    make: Callable[["ExpertInputs | None"], QuantizeExpert]
    """Function from an expert's inputs, None only without `needs_inputs`, to its quantizer"""
    objective: Objective | None = None
    """Measure that never exceeds that of rounding to nearest, except in a refitted last matrix;
    None: no promise"""
    needs_inputs: bool = False
    """Whether the quantizer needs the experts' inputs on a profile's tokens"""
    is_profiled: bool = False
    """Whether profiles hold its errors at every width; otherwise `plan` measures them"""
    makes_zeros: bool = False
    """Whether scales have zero points; otherwise grids are symmetric"""
    refit_last: RefitLast | None = None
    """Function that compensates earlier errors in the last matrix; None: nothing does"""
    source: str = ""
    """Paper of the rule"""

    @property
    def can_nest(self) -> bool:
        """Whether nested bits are supported: not with zero points."""
        return not self.makes_zeros


def weight_error(difference: "torch.Tensor", moments: "torch.Tensor") -> float:
    """Return the sum of squares of the weights' errors."""
    return float(difference.double().square().sum())


def output_error(difference: "torch.Tensor", moments: "torch.Tensor") -> float:
    """Return the mean square of the outputs' errors, summed over outputs."""
    wide = difference.double()
    return float(((wide @ moments.double()) * wide).sum())
