"""ECO: codes trained in place, without a master copy of the weights that they were rounded from.

Nikdan, Zandieh, Alistarh, Mirrokni, arXiv:2601.22101, Alg. 2 and 3. An update smaller than half a
step of the grid is lost when the weight is rounded again; ECO puts what was lost into the momentum,
scaled so that the next update makes up for it. Codes, their scales and the optimizer's own moments
are all that there is.

Everything here is in units of codes: 1 is the distance to the next point of the grid, a learning
rate is a share of it. The paper speaks of weights; that is the same up to the scale of a group,
which does not change here. With w~ = w - rate * m~ the exact feedback is

    m' = m~ + e_before / rate - e / (next rate * beta)

and the published one takes e for e_before, which then need not be stored. Deviations, each for a
reason: the last term divides by the rate that the next step will use, which its schedule knows (at
rates that change the paper's form forgets residuals as they fall); Adam's bias correction is
treated in the same way; residuals of codes that cannot follow, at the edge of their grid, are cut
at half a step (nearest) or a whole one (stochastic), or they would grow without end; a residual
from before the first step may be brought along; there is no weight decay.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

Optimizer = Literal["sgd", "adam"]
Rounding = Literal["nearest", "stochastic"]
Feedback = Literal["momentum", "exact", "none"]
_EPS = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class EcoRule:
    """How codes are updated."""

    optimizer: Optimizer = "sgd"
    rounding: Rounding = "nearest"
    feedback: Feedback = "momentum"
    """momentum: nothing is stored for it. exact: the last residual is, and with SGD and nearest
    rounding this is training with a master copy. none: what is lost is lost"""
    beta1: float = 0.9
    beta2: float = 0.99

    def __post_init__(self) -> None:
        """Refuse what is no rule.

        Raises:
            ValueError: without momentum there is nowhere to put what is lost; with Adam the scale
                of the next update is not known, so nothing is exact.
        """
        if not 0 < self.beta1 < 1 or not 0 <= self.beta2 < 1:
            raise ValueError(f"betas lie between 0 and 1, not {self.beta1:g} and {self.beta2:g}")
        if self.feedback == "exact" and self.optimizer != "sgd":
            raise ValueError("exact feedback is that of SGD")


@dataclass(frozen=True, slots=True, kw_only=True)
class EcoState:
    """State of a rule for one matrix, beside its codes and their scales."""

    step: int
    """Updates so far"""
    momentum: torch.Tensor
    """[out, in] float32"""
    variance: torch.Tensor | None
    """[out, in] float32; Adam's"""
    residual: torch.Tensor | None
    """[out, in] float32; of exact feedback"""

    @property
    def size_bytes(self) -> int:
        """Size of all that is kept."""
        held = (self.momentum, self.variance, self.residual)
        return sum(each.numel() * each.element_size() for each in held if each is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class EcoUpdate:
    """A matrix after one step."""

    codes: torch.Tensor
    """uint8 [out, in]"""
    state: EcoState


def state_bytes_per_weight(rule: EcoRule) -> int:
    """Return what an `EcoState` takes for a weight."""
    return 4 * (1 + (rule.optimizer == "adam") + (rule.feedback == "exact"))


def takes_residual(rule: EcoRule) -> bool:
    """Return whether a rule can begin with a residual.

    Adam's scale is not known before its first gradients, and stochastic rounding would at once
    throw dice over every weight.
    """
    return rule.optimizer == "sgd" and rule.rounding == "nearest" and rule.feedback != "none"


def begin(
    codes: torch.Tensor, rule: EcoRule, *, rate: float, residual: torch.Tensor | None = None
) -> EcoState:
    """Return the state before the first step.

    Args:
        codes: [out, in] of the matrix.
        rule: to be followed.
        rate: of the first step.
        residual: [out, in] float32, in codes: what was lost when the codes were made, see
            `takes_residual`. Overwritten.

    Raises:
        ValueError: a residual for a rule that takes none.
    """
    if residual is None:
        residual = torch.zeros(codes.shape, dtype=torch.float32)
    elif not takes_residual(rule):
        raise ValueError("only SGD with feedback and nearest rounding begins with a residual")
    return EcoState(
        step=0,
        residual=residual.clone() if rule.feedback == "exact" else None,
        momentum=residual.mul_(-1 / (rate * rule.beta1)),
        variance=torch.zeros_like(residual) if rule.optimizer == "adam" else None,
    )


def update(
    codes: torch.Tensor,
    gradient: torch.Tensor,
    state: EcoState,
    rule: EcoRule,
    *,
    rate: float,
    next_rate: float,
    width_bits: int,
    draw: torch.Generator | None = None,
) -> EcoUpdate:
    """Return a matrix one step on.

    Args:
        codes: uint8 [out, in], below 2**width_bits.
        gradient: [out, in] float32, of the loss by the codes.
        state: of the step before; its tensors are overwritten.
        rule: how.
        rate: of this step, in codes.
        next_rate: of the step after it.
        width_bits: of the grid.
        draw: for stochastic rounding.
    """
    step, beta = state.step + 1, rule.beta1
    momentum = state.momentum.mul_(beta).add_(gradient, alpha=1 - beta)  # m~
    now, then = rate, next_rate
    wanted = codes.float()
    spread: torch.Tensor | None = None
    if state.variance is None:
        wanted.sub_(momentum, alpha=now)
    else:
        square = state.variance.mul_(rule.beta2).addcmul_(gradient, gradient, value=1 - rule.beta2)
        spread = (square / (1 - rule.beta2**step)).sqrt_().add_(_EPS)
        now, then = now / (1 - beta**step), then / (1 - beta ** (step + 1))
        wanted.addcdiv_(momentum, spread, value=-now)
    rounded = _round(wanted, rule.rounding, draw).clamp_(0, 2**width_bits - 1)
    if rule.feedback != "none":
        most = 0.5 if rule.rounding == "nearest" else 1.0
        lost = wanted.sub_(rounded).clamp_(-most, most)  # e
        before = lost
        if state.residual is not None:
            before = state.residual.clone()
            state.residual.copy_(lost)
        change = before / now - lost / (then * beta)
        momentum.add_(change if spread is None else change.mul_(spread))
    return EcoUpdate(codes=rounded.to(torch.uint8), state=replace(state, step=step))


def _round(wanted: torch.Tensor, rounding: Rounding, draw: torch.Generator | None) -> torch.Tensor:
    if rounding == "nearest":
        return wanted.round()
    assert draw is not None, "stochastic rounding draws"
    return wanted.add(torch.rand(wanted.shape, generator=draw)).floor_()
