"""ECO: training of codes in place, without a master copy of the weights.

Nikdan, Zandieh, Alistarh, Mirrokni, arXiv:2601.22101, Alg. 2 and 3. An update smaller than half a
grid step is lost when the weight is rounded again; ECO adds this residual to the momentum, scaled
so that the next update compensates it. Only codes, scales and the optimizer's moments are stored.

All values are in units of codes: 1 is a grid step, and a learning rate is a share of it. This
equals the paper's form up to the scale of a group, which is fixed. With w~ = w - rate * m~ the
exact feedback is

    m' = m~ + e_before / rate - e / (next rate * beta)

and the published one uses e for e_before, which then need not be stored. Deviations: the last term
divides by the next step's rate, known from the schedule (the paper's form loses residuals as rates
fall); likewise for Adam's bias correction; residuals are clamped to half a step (nearest) or one
step (stochastic), or those of codes at the edge of the grid would grow without bound; training may
begin with a residual; there is no weight decay.
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
    """Rule by which codes are updated."""

    optimizer: Optimizer = "sgd"
    rounding: Rounding = "nearest"
    feedback: Feedback = "momentum"
    """Residual handling. momentum: as published, nothing stored. exact: the last residual is kept,
    which with SGD and nearest rounding equals training with a master copy. none: they are lost"""
    beta1: float = 0.9
    beta2: float = 0.99

    def __post_init__(self) -> None:
        """Check the rule.

        Raises:
            ValueError: a beta is out of range (without momentum there is no place for residuals),
                or exact feedback with Adam, whose next update has an unknown scale.
        """
        if not 0 < self.beta1 < 1 or not 0 <= self.beta2 < 1:
            raise ValueError(f"betas lie between 0 and 1, not {self.beta1:g} and {self.beta2:g}")
        if self.feedback == "exact" and self.optimizer != "sgd":
            raise ValueError("exact feedback is that of SGD")


@dataclass(frozen=True, slots=True, kw_only=True)
class EcoState:
    """Optimizer state of one matrix."""

    step: int
    """Number of updates so far"""
    momentum: torch.Tensor
    """[out, in] float32 first moment, residuals included"""
    variance: torch.Tensor | None
    """[out, in] float32 second moment; None for SGD"""
    residual: torch.Tensor | None
    """[out, in] float32 last residual; None without exact feedback"""

    @property
    def size_bytes(self) -> int:
        """Size of all tensors."""
        held = (self.momentum, self.variance, self.residual)
        return sum(each.numel() * each.element_size() for each in held if each is not None)


def state_bytes_per_weight(rule: EcoRule) -> int:
    """Return the bytes of an `EcoState` per weight."""
    return 4 * (1 + (rule.optimizer == "adam") + (rule.feedback == "exact"))


def takes_residual(rule: EcoRule) -> bool:
    """Return whether training by a rule can begin with a residual.

    Adam's scale is unknown before the first gradients, and stochastic rounding would at once
    randomise every weight.
    """
    return rule.optimizer == "sgd" and rule.rounding == "nearest" and rule.feedback != "none"


def begin(
    codes: torch.Tensor, rule: EcoRule, *, rate: float, residual: torch.Tensor | None = None
) -> EcoState:
    """Return the state before the first step.

    Args:
        codes: [out, in] codes of the matrix.
        rate: learning rate of the first step.
        residual: [out, in] float32, rounding error of the codes in grid steps, see
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
) -> tuple[torch.Tensor, EcoState]:
    """Return the codes, uint8 [out, in], and the state after one step.

    Args:
        codes: uint8 [out, in], below 2**width_bits.
        gradient: [out, in] float32, gradient of the loss by the codes.
        state: state after the previous step; its tensors are overwritten.
        rate: learning rate of this step, in grid steps.
        draw: generator for stochastic rounding.
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
    return rounded.to(torch.uint8), replace(state, step=step)


def _round(wanted: torch.Tensor, rounding: Rounding, draw: torch.Generator | None) -> torch.Tensor:
    if rounding == "nearest":
        return wanted.round()
    assert draw is not None, "stochastic rounding draws"
    return wanted.add(torch.rand(wanted.shape, generator=draw)).floor_()
