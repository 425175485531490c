"""Training of norms and routers by Adam towards the exact model's predictions."""

from dataclasses import dataclass

import torch

from moe_tool.tuning.float_weights import FloatWeights, Values
from moe_tool.tuning.streamed_bundle import StreamedBundle

_BETAS = (0.9, 0.99)
_EPS = 1e-8
_LAST_RATE = 0.1
"""Final learning rate as a share of the first"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FloatPlan:
    """Everything that decides the outcome of a training."""

    ids: torch.Tensor
    """[N, S] int64 token ids to train on"""
    n_steps: int
    at_once: int
    """Sequences per step"""
    rate: float
    """First learning rate, as a share of a tensor's root mean square"""
    seed: int

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        return self.rate * (1 - (1 - _LAST_RATE) * step / self.n_steps)

    def chosen(self, step: int) -> torch.Tensor:
        """Return the sequences of a step, [at_once] int64: all of them in turn, in a new order
        each time."""
        places = torch.arange(step * self.at_once, (step + 1) * self.at_once)
        orders = {int(turn): self._order(int(turn)) for turn in places // len(self.ids)}
        return torch.stack([orders[int(at) // len(self.ids)][at % len(self.ids)] for at in places])

    def _order(self, turn: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(self.seed + turn)
        return torch.randperm(len(self.ids), generator=draw)


class FloatTraining:
    """Values and moments of the trainable tensors, which may go on from a state."""

    def __init__(self, floats: FloatWeights, plan: FloatPlan) -> None:
        """Begin with the checkpoint's values."""
        self._plan = plan
        self._rates = {
            name: float(value.square().mean().sqrt()) for name, value in floats.start.items()
        }
        self.step = 0
        self._tensors = {
            f"{part}.{name}": value.clone() if part == "value" else torch.zeros_like(value)
            for name, value in floats.start.items()
            for part in ("value", "first", "second")
        }

    @property
    def values(self) -> Values:
        """Tensors as trained so far"""
        return {name: self._tensors[f"value.{name}"] for name in self._rates}

    def state(self) -> dict[str, torch.Tensor]:
        """Return the values and moments that a resume needs."""
        return dict(self._tensors)

    def restore(self, tensors: Values, *, step: int) -> None:
        """Go on after a step from the tensors of `state`."""
        self._tensors, self.step = dict(tensors), step

    def advance(self, bundle: StreamedBundle, exact: torch.Tensor) -> float:
        """Do one step and return the mean KL before it.

        Args:
            exact: [N, S, H] states of the exact model, see `StreamedBundle.exact_states`.
        """
        chosen = self._plan.chosen(self.step)
        loss, found = bundle.gradients(self._plan.ids[chosen], exact[chosen], self.values)
        rate = self._plan.rate_at(self.step)
        self.step += 1
        one, two = _BETAS
        for name, gradient in found.items():
            parts = [self._tensors[f"{part}.{name}"] for part in ("value", "first", "second")]
            value, first, second = parts
            first.mul_(one).add_(gradient, alpha=1 - one)
            second.mul_(two).addcmul_(gradient, gradient, value=1 - two)
            spread = (second / (1 - two**self.step)).sqrt_().add_(_EPS)
            scale = rate * self._rates[name] / (1 - one**self.step)
            value.addcdiv_(first, spread, value=-scale)
        return loss
