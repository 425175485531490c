"""A layer's output from experts that arrive in any order."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moe_tool.experts.expert_forward import expert_forward
from moe_tool.quantization.weights import FloatWeight, IntegerWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class _TokensByExpert:
    """Slots of a routing, sorted by expert, within one as transformers' eager loop has them."""

    token: torch.Tensor
    """[n] int64"""
    position: torch.Tensor
    """[n] int64: which of the token's K slots"""
    starts: list[int]
    """[E + 1]: expert e owns token[starts[e]:starts[e + 1]]"""

    def wanted(self) -> list[int]:
        """Return the experts that have tokens, ascending."""
        pairs = zip(self.starts, self.starts[1:], strict=False)
        return [expert for expert, (start, stop) in enumerate(pairs) if stop > start]


@torch.no_grad()
def run_experts(
    module: Any,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    supply: Iterator[tuple[int, Mapping[str, FloatWeight | IntegerWeight]]],
) -> torch.Tensor:
    """Return the weighted sum of the experts' outputs, bit-identical for every order of arrival.

    Each expert is computed as it arrives, but outputs are added in ascending order of experts,
    token by token as transformers' eager experts do; outputs that are early wait for their turn.

    Args:
        module: an experts module of transformers (`num_experts` and what `expert_forward` uses).
        hidden: [T, H] float32.
        index: [T, K] int64; below 0 or from E on, the slot is skipped.
        weight: [T, K] gate weights.
        supply: every expert named in `index`, once, each with its weights. They are not used any
            more when the next one is asked for.

    Returns:
        [T, H], in the dtype of `hidden`.
    """
    tokens = _sort_by_expert(index, module.num_experts)
    turns = iter(tokens.wanted())
    turn = next(turns, None)
    early: dict[int, torch.Tensor] = {}
    final = torch.zeros_like(hidden)
    for expert, weights in supply:
        rows = slice(tokens.starts[expert], tokens.starts[expert + 1])
        token = tokens.token[rows]
        output = expert_forward(module, weights, hidden[token])  # [n, H]
        early[expert] = output * weight[token, tokens.position[rows], None]
        while turn is not None and turn in early:
            rows = slice(tokens.starts[turn], tokens.starts[turn + 1])
            final.index_add_(0, tokens.token[rows], early.pop(turn).to(final.dtype))
            turn = next(turns, None)
    assert turn is None and not early, "the supply and the routing name different experts"
    return final


def _sort_by_expert(index: torch.Tensor, n_experts: int) -> _TokensByExpert:
    """Sort slots by expert in one pass.

    The eager loop takes `torch.where` of a [K, T] mask per expert: slot by slot, tokens ascending.
    A stable sort of the transposed index gives the same order.
    """
    n_tokens = index.shape[0]
    flat = index.T.reshape(-1)  # [K * T]
    flat = torch.where((flat < 0) | (flat >= n_experts), n_experts, flat)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=n_experts + 1)[:n_experts]
    starts = [0, *counts.cumsum(0).tolist()]
    order = order[: starts[-1]]
    return _TokensByExpert(
        token=order % max(n_tokens, 1), position=order // max(n_tokens, 1), starts=starts
    )
