"""Forward and backward of one expert, without keeping its float weights in between."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from moe_tool.tuning.code_matrix import CodeMatrix

_LAST = "down_proj"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ExpertPass:
    """Activations of a forward on n tokens, for the backward."""

    x: torch.Tensor
    """[n, H] input"""
    first: torch.Tensor
    """[n, 2I] or [n, I] output of the first matrix, a leaf"""
    inner: torch.Tensor
    """[n, I] input of the last matrix"""
    last: torch.Tensor
    """[n, H] output of the last matrix, a leaf"""
    output: torch.Tensor
    """[n, H] output of the expert"""


Values = Callable[[str], torch.Tensor]
"""Tensor name -> float32 values: matrices [out, in], biases [out]"""


def first_matrix(module: Any) -> str:
    """Return the name of the expert's first matrix."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def expert_pass(module: Any, names: Collection[str], values: Values, x: torch.Tensor) -> ExpertPass:
    """Compute an expert's output, in float32 throughout.

    Args:
        module: an experts module of transformers, see `expert_forward`.
        x: [n, H] float32.
    """
    first_name = first_matrix(module)

    def product(name: str, given: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found = F.linear(given, values(name))
            bias = f"{name}_bias"
            return found.add_(values(bias)) if bias in names else found

    with torch.enable_grad():
        first = product(first_name, x).requires_grad_()
        inner = module._apply_gate(first) if module.has_gate else module.act_fn(first)
        last = product(_LAST, inner.detach()).requires_grad_()
        output = module.post_expert_norm(last) if module.has_post_expert_norm else last
    return ExpertPass(x=x, first=first, inner=inner, last=last, output=output)


def gradients(
    module: Any, matrices: Mapping[str, CodeMatrix], done: ExpertPass, by_output: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the gradients of a loss by the codes of both matrices, [out, in] float32 each.

    Args:
        module: an experts module of transformers.
        by_output: [n, H] gradient of the loss by the expert's output.
    """
    by_last = by_output
    if done.output is not done.last:
        (by_last,) = torch.autograd.grad(done.output, done.last, by_output)
    last = matrices[_LAST]
    by_inner = by_last @ last.values()
    (by_first,) = torch.autograd.grad(done.inner, done.first, by_inner)
    name = first_matrix(module)
    return {
        name: matrices[name].by_codes(by_first.T @ done.x),
        _LAST: last.by_codes(by_last.T @ done.inner.detach()),
    }
