"""Prefetch of the next MoE layer's experts while this layer is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moe_tool.artifacts.routing import PRIMARY
from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.errors import UsageError
from moe_tool.models.moe_layers import MoeLayerModules
from moe_tool.models.skeleton import LayerCall
from moe_tool.policies.prefetch import PREFETCH, ChoosePrefetch
from moe_tool.store.protocol import ExpertStore

NO_PREFETCH = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefetcher:
    """Predictor that applies the next router to this layer's input: the residual stream changes
    little from one layer to the next."""

    choose: ChoosePrefetch
    following: Mapping[int, MoeLayerModules]
    """Decoder layer -> the MoE layer after it"""

    @torch.no_grad()
    def expect(self, call: LayerCall, store: ExpertStore, counters: PhaseCounters) -> None:
        """Prefetch the experts predicted for the next layer, once the call's demanded reads have
        begun; changes the store and counts prefetches."""
        modules = self.following.get(call.layer)
        if modules is None or modules.chooses_by_token:
            return
        routed = modules.route(call.routed_hidden)
        index = routed.index.numpy()  # [T, K]
        resident = store.resident(modules.layer)[PRIMARY]  # [E]
        experts = self.choose(index, routed.weight.numpy(), resident)
        if experts:
            spare = sorted(
                expert for expert in set(index.ravel().tolist()) if expert < len(resident)
            )
            store.prefetch(modules.layer, experts, spare=spare, counters=counters)


def choose_prefetcher(name: str, layers: Sequence[MoeLayerModules]) -> Prefetcher | None:
    """Return the prefetcher of a key of PREFETCH; None for "none". `layers` ascend."""
    choose = PREFETCH[name]
    if choose is None:
        return None
    following = {modules.layer: after for modules, after in zip(layers, layers[1:], strict=False)}
    return Prefetcher(choose=choose, following=following)


def require_prefetch(name: str, *, residency: str) -> None:
    """Refuse an unknown name, or prefetch into frozen memory.

    Raises:
        UsageError: the hint names settings that work.
    """
    if name not in PREFETCH:
        raise UsageError(
            f"--prefetch {name} is not known", hint=f"use one of {', '.join(PREFETCH)}"
        )
    if PREFETCH[name] is not None and residency == "frozen":
        raise UsageError(
            f"--prefetch {name}: the experts in memory are frozen, so none can be prefetched",
            hint="--policy exact, or --residency cache",
        )
