"""Recognition of an experts module's gate among those of the kernels, by probing the module."""

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from moe_tool.native.kernels import Gate

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
_N_INNER = 64
_found: WeakKeyDictionary[Any, Gate | None] = WeakKeyDictionary()


def gate_of(module: Any) -> Gate | None:
    """Return the gate equal to that of an experts module of transformers, or None.

    The candidates are tried on numbers from -20 to 20, where they all differ.
    """
    if module not in _found:
        _found[module] = _recognize(module)
    return _found[module]


def gate_output(gate: Gate, product: torch.Tensor) -> torch.Tensor:
    """Return the inner activations, [n, I], of the first product, [n, 2I] or [n, I]: the definition
    that the compiled kernels have to match."""
    if not gate.gated:
        return _ACTIVATIONS[gate.activation](product)
    if gate.interleaved:
        left, up = product[..., ::2], product[..., 1::2]
    else:
        left, up = product.chunk(2, dim=-1)
    if gate.activation == "clamped_swiglu":
        left = left.clamp(max=gate.limit)
        up = up.clamp(-gate.limit, gate.limit)
        return (up + 1) * (left * torch.sigmoid(left * gate.alpha))
    return _ACTIVATIONS[gate.activation](left) * up


def _recognize(module: Any) -> Gate | None:
    gated = bool(module.has_gate)
    width = 2 * _N_INNER if gated else _N_INNER
    draw = torch.Generator().manual_seed(0)
    probe = torch.rand(8, width, generator=draw).mul_(40).sub_(20)
    probe[4:] /= 8  # smaller numbers, where the activations bend
    with torch.no_grad():
        wanted = module._apply_gate(probe) if gated else module.act_fn(probe)
        for gate in _candidates(module, gated):
            found = gate_output(gate, probe)
            if found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-5, atol=1e-6):
                return gate
    return None


def _candidates(module: Any, gated: bool) -> Iterator[Gate]:
    for interleaved in (False, True) if gated else (False,):
        for name in _ACTIVATIONS:
            yield Gate(activation=name, gated=gated, interleaved=interleaved)
        alpha, limit = getattr(module, "alpha", None), getattr(module, "limit", None)
        if gated and isinstance(alpha, float | int) and isinstance(limit, float | int):
            yield Gate(
                activation="clamped_swiglu",
                gated=True,
                interleaved=interleaved,
                alpha=float(alpha),
                limit=float(limit),
            )
