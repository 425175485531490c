"""Training of one layer's experts towards a target of their summed output."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from moe_tool.quantization.weights import AnyWeight, FloatWeight, IntegerWeight
from moe_tool.tuning.code_matrix import CodeMatrix, take_apart
from moe_tool.tuning.eco import EcoState, begin, takes_residual, update
from moe_tool.tuning.expert_gradient import ExpertPass, expert_pass, gradients
from moe_tool.tuning.tune_options import TuneOptions

_MEASURED_AT_ONCE = 2048
"""Tokens per forward when the error is measured"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerText:
    """Inputs and targets of a layer's experts on T tokens."""

    inputs: torch.Tensor
    """[T, H] float32 inputs of the experts"""
    index: torch.Tensor
    """[T, K] int64 expert ids"""
    weight: torch.Tensor
    """[T, K] float32 gate weights"""
    target: torch.Tensor
    """[T, H] float32 target of the experts' weighted sum"""

    def rows(self, chosen: torch.Tensor) -> "LayerText":
        """Return the tokens with these row numbers, [n] int64."""
        return LayerText(
            inputs=self.inputs[chosen],
            index=self.index[chosen],
            weight=self.weight[chosen],
            target=self.target[chosen],
        )


@dataclass(slots=True)
class TunedExpert:
    """Expert in training; every step replaces its codes and states."""

    floats: Mapping[str, FloatWeight]
    """Biases, and the matrices of an expert in floats"""
    matrices: dict[str, CodeMatrix]
    """Matrices of codes by name"""
    states: dict[str, EcoState] = field(default_factory=dict)
    """Optimizer states of the matrices; empty if the expert is not trained"""
    units: dict[str, float] = field(default_factory=dict)
    """Root mean square of each matrix's first gradient"""

    def values(self, name: str) -> torch.Tensor:
        """Return a tensor in float32."""
        if name in self.matrices:
            return self.matrices[name].values()
        return self.floats[name].values.float()

    def packed(self) -> dict[str, AnyWeight]:
        """Return the tensors as a record holds them."""
        return {**self.floats, **{name: each.pack() for name, each in self.matrices.items()}}

    @property
    def state_bytes(self) -> int:
        """Size of the optimizer states."""
        return sum(state.size_bytes for state in self.states.values())


def unpack_expert(weights: Mapping[str, AnyWeight]) -> TunedExpert:
    """Return an expert with unpacked copies of its tensors."""
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
    expert: TunedExpert, exact: Mapping[str, torch.Tensor], options: TuneOptions
) -> None:
    """Set an expert's optimizer states, beginning with the rounding errors of its codes.

    Without these, all codes pulled in one direction would reach the next grid point in the same
    step, and the layer's output would jump.
    """
    rule, rate = options.rule, options.rate_at(0)
    for name, matrix in expert.matrices.items():
        residual = matrix.residual(exact[name]) if takes_residual(rule) else None
        expert.states[name] = begin(matrix.codes, rule, rate=rate, residual=residual)


def tune_layer(
    module: Any,
    experts: Mapping[int, TunedExpert],
    text: LayerText,
    rows: torch.Tensor,
    options: TuneOptions,
    *,
    seed: int,
    on_step: Callable[[], None],
) -> None:
    """Train codes to lower the mean squared error of the experts' weighted sum.

    Only one expert at a time is expanded to float weights.

    Args:
        module: an experts module of transformers.
        experts: all experts of the layer; those with states are trained.
        rows: [n] int64, tokens to train on.
    """
    draw = torch.Generator().manual_seed(seed)
    queue = rows[:0]
    for step in range(options.steps):
        if len(queue) < options.batch:
            queue = torch.cat([queue, rows[torch.randperm(len(rows), generator=draw)]])
        batch, queue = text.rows(queue[: options.batch]), queue[options.batch :]
        output, passes = _forward(module, experts, batch)
        by_sum = output.sub_(batch.target).mul_(2 / len(batch.inputs))  # [n, H]
        for expert in list(passes):
            part = passes.pop(expert)
            if experts[expert].states:
                by_output = by_sum[part.token] * part.gate
                found = gradients(module, experts[expert].matrices, part.done, by_output)
                _step(experts[expert], found, options, step, draw)
        on_step()


def layer_error(
    module: Any, experts: Mapping[int, TunedExpert], text: LayerText, rows: torch.Tensor
) -> float:
    """Return the root-mean-square error of the summed output relative to its target.

    Args:
        rows: [n] int64, tokens to measure on.
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
    """Forward of one expert on its n tokens of a batch."""

    token: torch.Tensor
    """[n] int64 token numbers in the batch"""
    gate: torch.Tensor
    """[n, 1] gate weights"""
    done: ExpertPass


def _forward(
    module: Any, experts: Mapping[int, TunedExpert], text: LayerText
) -> tuple[torch.Tensor, dict[int, _Part]]:
    """Return the experts' weighted sum [T, H], and each expert's forward."""
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
    options: TuneOptions,
    step: int,
    draw: torch.Generator,
) -> None:
    for name, gradient in found.items():
        unit = expert.units.setdefault(name, float(gradient.square().mean().sqrt()))
        if not unit > 0:  # no gradient yet: the unit stays unknown
            del expert.units[name]
            continue
        old = expert.matrices[name]
        codes, expert.states[name] = update(
            old.codes,
            gradient.div_(unit),
            expert.states[name],
            options.rule,
            rate=options.rate_at(step),
            next_rate=options.rate_at(step + 1),
            width_bits=old.stored.width_bits,
            draw=draw,
        )
        expert.matrices[name] = replace(old, codes=codes)
