"""Prediction of the next layer's experts from the part of this layer that is in memory.

Source: SMoE, arXiv:2508.18983.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from moe_tool.errors import UsageError
from moe_tool.models.layer_ahead import LayersAhead, pairs_of
from moe_tool.models.moe_layers import MoeLayerModules
from moe_tool.models.router_rule import RouterRule, router_rule
from moe_tool.models.skeleton import LayerCall, Skeleton
from moe_tool.policies.eviction import EvictionChoice
from moe_tool.policies.misses.score_shares import as_shares
from moe_tool.policies.prefetch import Prediction, keep_top_scores, parse_prefetch
from moe_tool.runtime.prefetcher import Prefetcher


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialLayer:
    """Layer call of which the experts in memory were computed."""

    call: LayerCall
    routed: torch.Tensor
    """Weighted sum of their outputs, [T, H]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialPredictor:
    """`Predictor` that runs the next layer's attention and router on the output that a layer has so
    far, and names the experts that score clearly above the cut."""

    ahead: LayersAhead
    rules: Mapping[int, RouterRule]
    """Decoder layer -> its router's arithmetic"""
    alpha: float
    """Width of the band of near-ties, which are not named"""

    @torch.no_grad()
    def predict(self, at: PartialLayer) -> Iterator[Prediction]:
        """Yield the top scores of the next layer, if it has experts."""
        seen = self.ahead.router_input(at.call.layer, at.routed)
        if seen is None:
            return
        modules = self.ahead.next[at.call.layer]
        routed, rule = modules.route(seen), self.rules[modules.layer]
        share = as_shares(
            rule.selection_scores(routed.logits).float().numpy(), are_logits=not rule.scores_differ
        )
        yield Prediction(
            layer=modules.layer,
            index=keep_top_scores(routed.index.numpy(), share, alpha=self.alpha),
            weight=routed.weight.float().numpy(),
        )


def choose_part_prefetcher(name: str, skeleton: Skeleton) -> Prefetcher[PartialLayer] | None:
    """Return the prefetcher of `--prefetch partial`; None for other names. It hooks the model until
    it is closed."""
    alpha = parse_prefetch(name).alpha
    if alpha is None:
        return None
    rules = require_part(name, skeleton.model, skeleton.layers)
    ahead = LayersAhead(skeleton.model, skeleton.layers)
    predictor = PartialPredictor(ahead=ahead, rules=rules, alpha=alpha)
    return Prefetcher(predictor=predictor, close=ahead.close)


def require_part(
    name: str,
    model: PreTrainedModel,
    layers: Sequence[MoeLayerModules],
) -> dict[int, RouterRule]:
    """Return the rules of the routers that `--prefetch partial` predicts; empty for other names.

    Args:
        name: text of --prefetch.
        model, layers: their tensors need not be loaded; layers ascend.

    Raises:
        UsageError: the model's layers or routers are of another form.
    """
    if parse_prefetch(name).alpha is None:
        return {}
    rules = {}
    for modules in pairs_of(model, layers).values():
        rule = router_rule(modules, model.config.get_text_config())
        if rule is None:
            raise UsageError(
                f"--prefetch {name}: how the routers of {model.config.model_type} score is unknown",
                hint="--prefetch next-layer",
            )
        rules[modules.layer] = rule
    return rules


def require_recordable(name: str, eviction: EvictionChoice) -> None:
    """Refuse to record a run whose predictions are of two kinds.

    Raises:
        UsageError: prefetches and the eviction policy go by different predictions.
    """
    if parse_prefetch(name).alpha is not None and "predictions" in eviction.hints:
        raise UsageError(
            f"--record-trace: a trace has predictions of one kind, and --prefetch {name} goes by "
            f"others than --eviction {eviction.name}",
            hint="--prefetch next-layer, or --eviction lru",
        )
