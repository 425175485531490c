"""Experts function of a session whose gate weights are masked, for training mask routers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.experts.combine import run_experts
from moe_tool.models.skeleton import LayerCall
from moe_tool.quantization.weights import ExpertWeights
from moe_tool.runtime.mask_scores import slot_order
from moe_tool.runtime.session import Session
from moe_tool.store.protocol import on_host
from moe_tool.tuning.weighed_experts import weighed_experts

ChooseMask = Callable[[LayerCall], torch.Tensor]
"""Layer call -> [T, K] float32 factors on the gate weights, by rank of gate weight"""
Watch = Callable[[LayerCall], None]


@dataclass(slots=True, kw_only=True)
class MaskedExperts:
    """Experts function; the mask is set before each forward."""

    session: Session
    mask: ChooseMask | None = None
    """Mask function; None: every expert runs"""
    watch: Watch | None = None
    """Callback on every layer call"""

    def __call__(self, call: LayerCall) -> torch.Tensor:
        """Return the routed experts' output, [T, H]."""
        if self.watch is not None:
            self.watch(call)

        def supply(wanted: list[int]) -> Iterator[tuple[int, ExpertWeights]]:
            return on_host(self.session.runner.store.acquire(call.layer, wanted, PhaseCounters()))

        if self.mask is None:
            return call.run_experts(supply)
        ranked = self.mask(call)
        mask = ranked.gather(1, slot_order(call.weight).argsort(dim=1))  # [T, K], slot by slot
        weight = call.weight * mask
        if not mask.requires_grad:  # skipped experts are not computed, as in a run
            return run_experts(
                call.module, call.hidden, call.index, weight, supply, present=mask > 0
            )
        index, present = call.find_present()
        return weighed_experts(call.module, call.hidden, index, weight, supply, present=present)

    def logits(self, ids: torch.Tensor, *, mask: ChooseMask | None = None) -> torch.Tensor:
        """Return the model's predictions in one wide forward, [B, S, V].

        A mask depends on each token's routing alone, so decoding token by token gives the same.

        Args:
            ids: [B, S] int64 token ids.
            mask: mask function of this forward; None: every expert runs.
        """
        self.mask = mask
        try:
            output: torch.Tensor = self.session.model(input_ids=ids, use_cache=False).logits
            return output
        finally:
            self.mask = None
