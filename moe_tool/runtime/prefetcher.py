"""Prefetch of the next MoE layers' experts while this layer is computed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch

from moe_tool.artifacts.routing import PRIMARY
from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.errors import UsageError
from moe_tool.models.moe_layers import MoeLayerModules
from moe_tool.models.router_rule import RouterRule
from moe_tool.models.skeleton import LayerCall
from moe_tool.policies.misses import MissPolicy
from moe_tool.policies.prefetch import (
    Prediction,
    Predictor,
    answer_prediction,
    choose_prefetches,
    parse_prefetch,
)
from moe_tool.runtime.stacked_gates import StackedPredictor, stack_gates
from moe_tool.store.protocol import ExpertStore

Input = TypeVar("Input")


def _nothing() -> None:
    """Close a predictor that holds nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterPredictor:
    """`Predictor` that applies the next routers to this layer's input: the residual stream changes
    little from one layer to the next."""

    following: Mapping[int, Sequence[MoeLayerModules]]
    """Decoder layer -> the MoE layers after it that are predicted"""

    @torch.no_grad()
    def predict(self, at: LayerCall) -> Iterator[Prediction]:
        """Yield the routing of the next layers, one router at a time, the nearest first."""
        for modules in self.following[at.layer]:
            if modules.chooses_by_token:
                continue
            routed = modules.route(at.routed_hidden)
            yield Prediction(
                layer=modules.layer,
                index=routed.index.numpy(),
                weight=routed.weight.numpy(),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefetcher(Generic[Input]):
    """Prefetches of what a predictor expects."""

    predictor: Predictor[Input]
    close: Callable[[], None] = _nothing
    """Removes the predictor's hooks"""

    def expect(
        self,
        at: Input,
        store: ExpertStore,
        counters: PhaseCounters,
        *,
        stored: Mapping[int, torch.Tensor],
        policy: MissPolicy | None = None,
        heard: Callable[[Prediction], None] | None = None,
    ) -> None:
        """Prefetch the experts predicted for the next layers, once the call's demanded reads have
        begun; changes the store and counts prefetches.

        Args:
            at: what the predictor predicts from.
            stored: decoder layer -> experts in the bundle, [E] bool; empty if none was removed.
            policy: chooses the forms to read; None: every predicted expert is read in full.
            heard: told of every prediction that was asked for.
        """
        predictions = self.predictor.predict(at)
        if heard is not None:
            predictions = _told(predictions, heard)
        if policy is not None:
            predictions = _answered(predictions, policy, store, stored)

        def present(layer: int) -> np.ndarray:
            resident: np.ndarray = store.resident(layer)  # [F, E]
            if policy is not None:
                return resident.reshape(-1)  # removed experts are not predicted
            whole: np.ndarray = resident[PRIMARY]
            return whole | ~stored[layer].numpy() if stored else whole

        for wanted in choose_prefetches(predictions, present):
            store.prefetch(wanted.layer, wanted.experts, spare=wanted.spare, counters=counters)


def _told(
    predictions: Iterator[Prediction], heard: Callable[[Prediction], None]
) -> Iterator[Prediction]:
    for each in predictions:
        heard(each)
        yield each


def _answered(
    predictions: Iterator[Prediction],
    policy: MissPolicy,
    store: ExpertStore,
    stored: Mapping[int, torch.Tensor],
) -> Iterator[Prediction]:
    for each in predictions:
        there = stored[each.layer].numpy() if stored else None
        resident = store.resident(each.layer)
        yield answer_prediction(each, policy, resident=resident, stored=there)


def choose_prefetcher(
    name: str, layers: Sequence[MoeLayerModules], rules: Mapping[int, RouterRule]
) -> Prefetcher[LayerCall] | None:
    """Return the prefetcher of a `--prefetch` text that predicts from a layer's input; None for
    other texts. Routers of several layers are asked by one product where they can be stacked.

    Args:
        layers: every MoE layer, ascending, with its tensors loaded.
        rules: decoder layer -> router rule; empty if the rule is unknown.
    """
    choice = parse_prefetch(name)
    depth = choice.depth
    if not depth or choice.alpha is not None:
        return None
    gates = stack_gates(layers, rules) if depth > 1 else None
    if gates is not None:
        return Prefetcher(predictor=StackedPredictor(gates=gates, depth=depth))
    following = {each.layer: layers[at + 1 : at + 1 + depth] for at, each in enumerate(layers)}
    return Prefetcher(predictor=RouterPredictor(following=following))


def require_prefetch(name: str, *, residency: str) -> None:
    """Refuse an unknown name, or prefetch into frozen memory.

    Raises:
        UsageError: the hint names settings that work.
    """
    if parse_prefetch(name).depth and residency == "frozen":
        raise UsageError(
            f"--prefetch {name}: the experts in memory are frozen, so none can be prefetched",
            hint="--policy exact, or --residency cache",
        )
