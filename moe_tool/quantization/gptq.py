"""GPTQ: columns rounded one after the other, each one's error compensated in the remaining columns.

Frantar et al., arXiv:2210.17323. Codes start on round-to-nearest's grid; then scales are fitted to
the codes (fitted_scales.py), and at 1 and 2 bits both steps are repeated. Inputs go in descending
order of energy ("act-order"), so that errors of the most important ones can still be compensated.
On a trained model of 16 experts the outputs' error fell from 0.079, 0.160, 0.338 and 0.740 at 4, 3,
2 and 1 bits to 0.040, 0.081, 0.174 and 0.370.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from moe_tool.quantization.fitted_scales import fit_scales
from moe_tool.quantization.round_to_nearest import (
    GROUP,
    from_codes,
    grid_scales,
    nearest_codes,
    wide_scales,
)
from moe_tool.quantization.weights import IntegerWeight

Vectors = Sequence[torch.Tensor]
BLOCK = 128
"""Inputs whose errors are propagated to later blocks at once"""
_DAMPING = 0.01
_MORE_DAMPING = 10.0
_MOST_DAMPING = 10.0
_PASSES: Mapping[int, int] = {1: 3, 2: 2}
"""Rounds of codes and scales by width, else 1: more changed nothing"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorSpread:
    """Propagation of each input's rounding error to the inputs rounded after it."""

    order: torch.Tensor
    """[in] int64: inputs in the order of rounding"""
    carry: torch.Tensor
    """[in, in] float32, upper triangular: Cholesky factor of the inverse Hessian in that order"""
    hessian: torch.Tensor | None
    """[in, in] float32, damped Hessian; None without inputs"""

    def solve(self, values: torch.Tensor) -> torch.Tensor:
        """Return the damped Hessian's inverse times [in, n] values."""
        found = torch.empty_like(values)
        found[self.order] = self.carry.T @ (self.carry @ values[self.order])
        return found


def error_spread(hessian: torch.Tensor, order: torch.Tensor | None = None) -> ErrorSpread:
    """Return the error propagation of a matrix's inputs, for any number of bits.

    Args:
        hessian: [in, in] float32: mean of x x^T over the matrix's inputs; zero without inputs, and
            then rounding is to nearest.
        order: [in] int64: order of rounding; None: by descending energy.
    """
    if order is None:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    energy = float(hessian.diagonal().mean())
    if not energy > 0:
        return ErrorSpread(order=order, carry=torch.eye(len(hessian)), hessian=None)
    carry, damping = _carry(hessian[order][:, order], energy)
    damped = hessian + damping * energy * torch.eye(len(hessian))
    return ErrorSpread(order=order, carry=carry, hessian=damped)


def quantize_gptq(
    weight: torch.Tensor, spread: ErrorSpread, width_bits: int, *, group: int = GROUP
) -> IntegerWeight:
    """Return the codes and scales of a matrix.

    Args:
        weight: [out, in], any float dtype.
        width_bits: 1 to 8.
        group: inputs per scale, a multiple of 32.

    Raises:
        CorruptArtifactError: the matrix holds NaN or infinity.
    """
    scales = grid_scales(weight, width_bits, group=group)  # [out, G]
    wide = weight.float()

    def choose(_: int, wanted: Vectors, steps: Vectors) -> Vectors:
        return [nearest_codes(wanted[0], steps[0], width_bits)]

    def spread_codes() -> torch.Tensor:
        steps = wide_scales(scales, n_inputs=wide.shape[1], group=group).T
        return spread_rounding([wide], [spread], [steps], choose)

    codes = spread_codes()
    if spread.hessian is not None:
        for left in reversed(range(_PASSES.get(width_bits, 1))):
            scales = fit_scales(wide, codes, scales, spread.hessian, group=group)
            if left:
                codes = spread_codes()
    return from_codes(codes, scales, width_bits, group=group)


def spread_rounding(
    weights: Sequence[torch.Tensor],
    spreads: Sequence[ErrorSpread],
    steps: Sequence[torch.Tensor],
    choose: Callable[[int, Vectors, Vectors], Vectors],
) -> torch.Tensor:
    """Round the inputs of one or several matrices together; each propagates its own errors.

    Args:
        weights: [out, in] float32 each.
        spreads: error propagation of each matrix, in the same order of inputs.
        steps: grid steps of each matrix, [in, out].
        choose: function from a position in the order, the wanted values and the steps of each
            matrix there, [out] each, to the points of each matrix's grid.

    Returns:
        Chosen points of the first matrix's grid, [out, in] float32.
    """
    order = spreads[0].order
    carries = [spread.carry for spread in spreads]
    # One row per input: its weights plus the compensation for earlier errors.
    left = [weight.T[order] for weight in weights]  # [in, out] each
    ordered = [step[order] for step in steps]
    points = torch.empty_like(left[0])
    n_in = len(order)
    for start in range(0, n_in, BLOCK):
        stop = min(start + BLOCK, n_in)
        errors = [torch.empty(stop - start, each.shape[1]) for each in left]
        for at in range(start, stop):
            here = [step[at] for step in ordered]
            chosen = choose(at, [each[at] for each in left], here)
            points[at] = chosen[0]
            for side, carry in enumerate(carries):
                error = errors[side][at - start]
                torch.sub(left[side][at], chosen[side] * here[side], out=error)
                error.div_(carry[at, at])
                left[side][at + 1 : stop].addr_(carry[at, at + 1 : stop], error, alpha=-1)
        for side, carry in enumerate(carries):
            left[side][stop:].addmm_(carry[start:stop, stop:].T, errors[side], alpha=-1)
    return points[torch.argsort(order)].T.contiguous()


def _carry(hessian: torch.Tensor, energy: float) -> tuple[torch.Tensor, float]:
    """Return the upper Cholesky factor of the damped Hessian's inverse, whose row i spreads input
    i's error, and the damping that float32 needed, relative to the mean energy of an input."""
    n_in = len(hessian)
    damping = _DAMPING
    while damping <= _MOST_DAMPING:
        damped = hessian + damping * energy * torch.eye(n_in)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(torch.isfinite(upper).all()):
                return upper, damping
        damping *= _MORE_DAMPING
    # No propagation, scaled as by damping alone.
    return torch.eye(n_in) / (damping * energy) ** 0.5, damping
