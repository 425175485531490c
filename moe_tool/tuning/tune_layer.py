"""The experts of one layer, trained on what is wanted of the whole layer."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from moe_tool.quantization.weights import FloatWeight, IntegerWeight
from moe_tool.tuning.code_matrix import CodeMatrix, take_apart
from moe_tool.tuning.eco import EcoRule, EcoState, begin, takes_residual, update
from moe_tool.tuning.expert_gradient import ExpertPass, expert_pass, gradients

_LAST_RATE = 0.1
"""Share of the learning rate that is left at the end"""
_MEASURED_AT_ONCE = 2048
"""Tokens"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerText:
    """Inputs of a layer's experts, and the output that is wanted. T tokens."""

    inputs: torch.Tensor
    """[T, H] float32"""
    index: torch.Tensor
    """[T, K] int64"""
    weight: torch.Tensor
    """[T, K] float32"""
    target: torch.Tensor
    """[T, H] float32: the weighted sum of the experts' outputs that is wanted"""

    def rows(self, chosen: torch.Tensor) -> "LayerText":
        """Return some of the tokens, [n] int64."""
        return LayerText(
            inputs=self.inputs[chosen],
            index=self.index[chosen],
            weight=self.weight[chosen],
            target=self.target[chosen],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneSchedule:
    """How long, how fast, by which rule."""

    rule: EcoRule
    steps: int
    rate: float
    """Learning rate of the first step, in codes: how far a step moves one whose gradient is as
    large as its matrix's first gradient is on average. It falls to a tenth, on a line"""
    batch: int
    """Tokens of a step"""
    seed: int

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, from 0."""
        return self.rate * (1 - (1 - _LAST_RATE) * step / self.steps)


@dataclass(slots=True)
class TunedExpert:
    """One expert of a layer; with every step its codes and states are replaced."""

    floats: Mapping[str, FloatWeight]
    """Biases; of an expert of floats its matrices too"""
    matrices: dict[str, CodeMatrix]
    """By name"""
    states: dict[str, EcoState] = field(default_factory=dict)
    """States of the matrices; empty where the expert is to stay as it is"""
    units: dict[str, float] = field(default_factory=dict)
    """Mean size of the first gradient of each matrix"""

    def values(self, name: str) -> torch.Tensor:
        """Return a tensor in float32."""
        if name in self.matrices:
            return self.matrices[name].values()
        return self.floats[name].values.float()

    def packed(self) -> dict[str, FloatWeight | IntegerWeight]:
        """Return its tensors as a record holds them."""
        return {**self.floats, **{name: each.pack() for name, each in self.matrices.items()}}

    @property
    def state_bytes(self) -> int:
        """Size of the optimizer's state for this expert."""
        return sum(state.size_bytes for state in self.states.values())


def unpack_expert(weights: Mapping[str, FloatWeight | IntegerWeight]) -> TunedExpert:
    """Return an expert whose codes can move; the record that it lies in may be overwritten."""
    return TunedExpert(
        floats={
            name: FloatWeight(values=weight.values.clone())
            for name, weight in weights.items()
            if isinstance(weight, FloatWeight)
        },
        matrices={
            name: take_apart(weight)
            for name, weight in weights.items()
            if isinstance(weight, IntegerWeight)
        },
    )


def begin_expert(
    expert: TunedExpert, exact: Mapping[str, torch.Tensor], schedule: TuneSchedule
) -> None:
    """Let an expert's codes move, with what rounding has lost of the exact weights to begin with.

    Without that all codes that are pulled in one direction would come to the next point of their
    grid in the same step, and the layer would leap.

    Args:
        expert: its states are set.
        exact: the checkpoint's tensors, by name.
        schedule: of the steps to come.
    """
    rule, rate = schedule.rule, schedule.rate_at(0)
    for name, matrix in expert.matrices.items():
        residual = matrix.residual(exact[name]) if takes_residual(rule) else None
        expert.states[name] = begin(matrix.codes, rule, rate=rate, residual=residual)


def tune_layer(
    module: Any,
    experts: Mapping[int, TunedExpert],
    text: LayerText,
    rows: torch.Tensor,
    schedule: TuneSchedule,
    *,
    on_step: Callable[[], None],
) -> None:
    """Move codes so that the experts' summed output comes closer to what is wanted.

    The loss is the mean squared error of the sum. Of one expert at a time there are weights.

    Args:
        module: an experts module of transformers.
        experts: all that there are; those with states are changed.
        text: of the layer.
        rows: [n] int64: the tokens to learn from.
        schedule: steps and rates.
        on_step: called after every step.
    """
    draw = torch.Generator().manual_seed(schedule.seed)
    queue = rows[:0]
    for step in range(schedule.steps):
        if len(queue) < schedule.batch:
            queue = torch.cat([queue, rows[torch.randperm(len(rows), generator=draw)]])
        batch, queue = text.rows(queue[: schedule.batch]), queue[schedule.batch :]
        output, passes = _forward(module, experts, batch)
        by_sum = output.sub_(batch.target).mul_(2 / len(batch.inputs))  # [n, H]
        for expert in list(passes):
            part = passes.pop(expert)
            if experts[expert].states:
                by_output = by_sum[part.token] * part.gate
                found = gradients(module, experts[expert].matrices, part.done, by_output)
                _step(experts[expert], found, schedule, step, draw)
        on_step()


def layer_error(
    module: Any, experts: Mapping[int, TunedExpert], text: LayerText, rows: torch.Tensor
) -> float:
    """Return the error of the summed output relative to what is wanted, root of the mean square.

    Args:
        rows: [n] int64: the tokens to judge by.
    """
    error = energy = 0.0
    for chosen in torch.split(rows, _MEASURED_AT_ONCE):
        part = text.rows(chosen)
        output, _ = _forward(module, experts, part)
        error += float((output - part.target).square().sum())
        energy += float(part.target.square().sum())
    return math.sqrt(error / energy) if energy > 0 else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Forward of one expert for a batch. n tokens."""

    token: torch.Tensor
    """[n] int64, of the batch"""
    gate: torch.Tensor
    """[n, 1]"""
    done: ExpertPass


def _forward(
    module: Any, experts: Mapping[int, TunedExpert], text: LayerText
) -> tuple[torch.Tensor, dict[int, _Part]]:
    """The experts' weighted sum [T, H], and what each did."""
    output = torch.zeros_like(text.target)
    parts: dict[int, _Part] = {}
    for expert, each in sorted(experts.items()):
        token, slot = torch.nonzero(text.index == expert, as_tuple=True)
        if not len(token):
            continue
        names = (*each.matrices, *each.floats)
        done = expert_pass(module, names, each.values, text.inputs[token])
        gate = text.weight[token, slot, None]
        output.index_add_(0, token, done.output.detach() * gate)
        parts[expert] = _Part(token, gate, done)
    return output, parts


def _step(
    expert: TunedExpert,
    found: Mapping[str, torch.Tensor],
    schedule: TuneSchedule,
    step: int,
    draw: torch.Generator,
) -> None:
    for name, gradient in found.items():
        unit = expert.units.setdefault(name, float(gradient.square().mean().sqrt()))
        if not unit > 0:  # nothing flows through it yet: the unit is still to be found
            del expert.units[name]
            continue
        old = expert.matrices[name]
        new = update(
            old.codes,
            gradient.div_(unit),
            expert.states[name],
            schedule.rule,
            rate=schedule.rate_at(step),
            next_rate=schedule.rate_at(step + 1),
            width_bits=old.stored.width_bits,
            draw=draw,
        )
        expert.matrices[name] = replace(old, codes=new.codes)
        expert.states[name] = new.state
