"""Description of a quantizer in its own file: name, help, needs, what its codes can be used for.

Nothing here or in the registry loads torch, so that --help can list the quantizers: their files
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
"""Function from what a matrix is off by, [out, in], and the second moments of its inputs, [in, in],
to what the quantizer makes small"""
RefitLast = Callable[
    ["ExpertInputs", "torch.Tensor", Mapping[str, "FloatWeight | IntegerWeight"]], "torch.Tensor"
]
"""Function from inputs, the last matrix and inexact ones before it to the last matrix that makes
up for these, [H, I] float32"""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizerSpec:
    """Everything that the tool has to know of one quantizer."""

    name: str
    """Name that `--quantizer` takes"""
    summary: str
    """How codes and scales are chosen"""
    make: Callable[["ExpertInputs | None"], QuantizeExpert]
    """Function from what one expert is given to its quantizer; None only where `needs_inputs` is
    not set"""
    objective: Objective | None = None
    """Measure that is never more than with rounding to nearest, for each matrix but the last of a
    quantizer that refits it; None: nothing of the kind is promised"""
    needs_inputs: bool = False
    """Whether it goes by the inputs of experts on a profile's tokens"""
    is_profiled: bool = False
    """Whether a profile has its errors at every width; those of others `plan` has to measure"""
    makes_zeros: bool = False
    """Whether scales have zero points; otherwise grids are symmetric"""
    refit_last: RefitLast | None = None
    """Function that makes up in the last matrix for errors before it; None: nothing does"""
    source: str = ""
    """Paper of the rule"""

    @property
    def can_nest(self) -> bool:
        """Whether the first bits of its codes can be an expert too: not with zero points."""
        return not self.makes_zeros
