"""Weighted sum of experts that arrive in any order."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from moe_tool.experts.expert_forward import expert_forward
from moe_tool.quantization.weights import AnyWeight

Supplied = Iterator[tuple[int, Mapping[str, AnyWeight]]]
Supply = Callable[[list[int]], Supplied]
"""Function from distinct experts, ascending, to each with its weights, in any order. Weights may be
freed when the next expert is requested."""
Watch = Callable[[int, torch.Tensor | None, torch.Tensor], None]
"""Callback for each expert as it is computed: its number, the rows of its tokens, None for the only
one, and its weighted outputs, [n, H], not to be changed"""


def run_experts(
    module: Any,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    supply: Supply,
    *,
    present: torch.Tensor | None = None,
    watch: Watch | None = None,
) -> torch.Tensor:
    """Return the weighted sum of the experts' outputs, bit-identical for every order of arrival,
    [T, H] in the dtype of `hidden`.

    Each expert is computed as it arrives, but outputs are added in ascending order of experts, as
    transformers' eager experts do; early outputs wait for their turn.

    Args:
        module: an experts module of transformers, see `expert_forward`.
        hidden: [T, H] float32.
        index: [T, K] int64: experts, by any numbers that `supply` takes.
        weight: [T, K] gate weights.
        supply: called once, with the experts of the present slots.
        present: [T, K] bool: slots to compute; None: all.
        watch: told of every expert's output.
    """
    if torch.is_grad_enabled():
        with torch.no_grad():  # 4 us, avoided if the caller has done so
            return run_experts(module, hidden, index, weight, supply, present=present, watch=watch)
    if hidden.shape[0] == 1 and hidden.dtype == weight.dtype == torch.float32:
        slots = list(zip(index.tolist()[0], weight.reshape(-1, 1, 1).unbind(), strict=True))
        if present is not None:
            slots = [slot for slot, fills in zip(slots, present.tolist()[0], strict=True) if fills]
        gate_of = dict(slots)
        if len(gate_of) == len(slots):  # an expert in two slots is rounded differently as 2 rows
            return _run_one_token(module, hidden, gate_of, supply, watch)
    return _run_tokens(module, hidden, index, weight, supply, present, watch)


def _run_one_token(
    module: Any,
    hidden: torch.Tensor,
    gate_of: dict[int, torch.Tensor],
    supply: Supply,
    watch: Watch | None,
) -> torch.Tensor:
    """Do what `_run_tokens` does, without gathering: the same products, added in the same order.

    Gates are [1, 1] tensors, because torch would have to convert Python numbers.
    """
    wanted = sorted(gate_of)
    early: dict[int, torch.Tensor] = {}
    final = torch.zeros_like(hidden)
    turn, n_wanted = 0, len(wanted)
    for expert, weights in supply(wanted):
        early[expert] = expert_forward(module, weights, hidden).mul_(gate_of[expert])  # [1, H]
        if watch is not None:
            watch(expert, None, early[expert])
        while turn < n_wanted and wanted[turn] in early:
            final.add_(early.pop(wanted[turn]))
            turn += 1
    assert turn == n_wanted and not early, "the supply and the routing name different experts"
    return final


def _run_tokens(
    module: Any,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    supply: Supply,
    present: torch.Tensor | None,
    watch: Watch | None = None,
) -> torch.Tensor:
    # The eager loop takes `torch.where` of a [K, T] mask per expert: slot by slot, tokens
    # ascending. A stable sort of the transposed index gives the same order.
    n_tokens = max(index.shape[0], 1)
    flat = index.T.reshape(-1)  # [K * T]
    if present is None:
        order = torch.argsort(flat, stable=True)
    else:
        slots = torch.nonzero(present.T.reshape(-1)).flatten()
        flat = flat[slots]
        order = slots[torch.argsort(flat, stable=True)]
    token = order % n_tokens
    gates = weight[token, order // n_tokens, None]  # [n, 1]
    slots_of = {expert: n for expert, n in enumerate(torch.bincount(flat).tolist()) if n}
    experts, counts = list(slots_of), list(slots_of.values())
    rows = dict(zip(experts, token.split_with_sizes(counts), strict=True))
    gates_of = dict(zip(experts, gates.split_with_sizes(counts), strict=True))
    turns = iter(experts)
    turn = next(turns, None)
    early: dict[int, torch.Tensor] = {}
    final = torch.zeros_like(hidden)
    for expert, weights in supply(experts):
        inputs = hidden.index_select(0, rows[expert])  # [n, H]
        early[expert] = expert_forward(module, weights, inputs) * gates_of[expert]
        if watch is not None:
            watch(expert, rows[expert], early[expert])
        while turn is not None and turn in early:
            final.index_add_(0, rows[turn], early.pop(turn).to(final.dtype))
            turn = next(turns, None)
    assert turn is None and not early, "the supply and the routing name different experts"
    return final
