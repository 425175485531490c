"""Error measures of a quantized matrix, which quantizers minimise."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def weight_error(difference: "torch.Tensor", moments: "torch.Tensor") -> float:
    """Return the sum of squares of the weights' errors."""
    return float(difference.double().square().sum())


def output_error(difference: "torch.Tensor", moments: "torch.Tensor") -> float:
    """Return the mean square of the outputs' errors, summed over outputs."""
    wide = difference.double()
    return float(((wide @ moments.double()) * wide).sum())
