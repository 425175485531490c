"""Routers' arithmetic by architecture, applicable to any chosen set of experts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from moe_tool.models.moe_layers import MoeLayerModules

Scores = Callable[[torch.Tensor], torch.Tensor]
Weights = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterRule:
    """Arithmetic of one layer's router; biases are read from its modules at every call."""

    selection_scores: Scores
    """Function of logits [T, E] -> [T, E] finite float32 scores, of which the K highest win."""
    weights: Weights
    """Function of (logits [T, E], index [T, K'] int64) -> [T, K'] float32: gate weights that the
    model would give these experts had it chosen them, renormalised if the model does that."""
    scores_differ: bool
    """Whether selection can rank experts differently from the logits (a bias, or groups)."""


def router_rule(modules: MoeLayerModules, config: PreTrainedConfig) -> RouterRule | None:
    """Return the rule of one MoE layer; None for an unknown architecture.

    Args:
        modules: the layer's modules; the router's tensors need not be loaded yet.
        config: the model's configuration.
    """
    make = _RULES.get(config.model_type)
    return None if make is None else make(modules)


def weights_of_sets(
    rule: RouterRule, logits: torch.Tensor, index: torch.Tensor, present: torch.Tensor
) -> torch.Tensor:
    """Return the rule's weights of sets of different sizes, [T, K] float32; 0 in empty slots.

    Args:
        rule: the layer's rule.
        logits: [T, E] float32.
        index: [T, K] int64.
        present: [T, K] bool: False where a slot is empty.
    """
    if bool(present.all()):
        return rule.weights(logits, index)
    weights = torch.zeros(index.shape)
    sizes = present.sum(dim=1)
    for size in sorted(set(sizes.tolist()) - {0}):
        row = torch.nonzero(sizes == size).flatten()
        # Filled slots first, in their order.
        position = (~present[row]).int().argsort(dim=1, stable=True)[:, :size]
        found = rule.weights(logits[row], index[row].gather(1, position))
        weights[row] = weights[row].scatter(1, position, found.float())
    return weights


def _softmax_normalized(modules: MoeLayerModules) -> RouterRule:
    """Softmax over the chosen: mixtral, granitemoe, gpt_oss, hunyuan_v1_moe."""
    return _plain(_softmax_among_chosen)


def _softmax_optionally_normalized(modules: MoeLayerModules) -> RouterRule:
    """Softmax over all, renormalised if the config says so: qwen2_moe, qwen3_moe, olmoe."""
    is_normalized = bool(modules.router.norm_topk_prob)
    return _plain(_softmax_among_chosen if is_normalized else _softmax_among_all)


def _deepseek_v2(modules: MoeLayerModules) -> RouterRule:
    """Softmax over all experts times a factor; choice may be limited to the best groups."""
    router: Any = modules.router
    factor = float(router.routed_scaling_factor)

    def weights(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return _softmax_among_all(logits, index) * factor

    if router.topk_method != "group_limited_greedy":
        return _plain(weights)

    def scores(logits: torch.Tensor) -> torch.Tensor:
        probability = logits.float().softmax(dim=-1)  # [T, E]
        by_group = probability.view(
            len(probability), router.num_group, -1
        )  # [T, groups, E / groups]
        return _bar_groups(probability, by_group.amax(dim=-1), router.topk_group)

    return RouterRule(selection_scores=scores, weights=weights, scores_differ=True)


def _sigmoid_groups(modules: MoeLayerModules) -> RouterRule:
    """Sigmoids; a learned bias and groups affect selection only: deepseek_v3, glm4_moe."""
    router: Any = modules.router
    factor = float(router.routed_scaling_factor)

    def scores(logits: torch.Tensor) -> torch.Tensor:
        biased: torch.Tensor = logits.float().sigmoid() + router.e_score_correction_bias  # [T, E]
        by_group = biased.view(len(biased), router.num_group, -1)  # [T, groups, E / groups]
        return _bar_groups(biased, by_group.topk(2, dim=-1)[0].sum(dim=-1), router.topk_group)

    def weights(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        chosen = logits.float().sigmoid().gather(1, index)  # [T, K']
        if router.norm_topk_prob:
            chosen = chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20)
        return chosen * factor

    return RouterRule(selection_scores=scores, weights=weights, scores_differ=True)


def _minimax_m2(modules: MoeLayerModules) -> RouterRule:
    """Sigmoids, renormalised; the block's bias affects selection only."""
    block: Any = modules.block

    def scores(logits: torch.Tensor) -> torch.Tensor:
        bias: torch.Tensor = block.e_score_correction_bias  # [E]
        return logits.float().sigmoid() + bias  # [T, E]

    def weights(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        chosen = logits.float().sigmoid().gather(1, index)  # [T, K']
        return chosen / chosen.sum(dim=-1, keepdim=True)

    return RouterRule(selection_scores=scores, weights=weights, scores_differ=True)


def _ernie(modules: MoeLayerModules) -> RouterRule:
    """Softmax, renormalised; a bias affects selection only."""
    router: Any = modules.router

    def scores(logits: torch.Tensor) -> torch.Tensor:
        bias: torch.Tensor = router.moe_statics.e_score_correction_bias.squeeze(0)  # [E]
        return logits.float().softmax(dim=-1) + bias  # [T, E]

    def weights(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        chosen = logits.float().softmax(dim=-1).gather(1, index)  # [T, K']
        return chosen / chosen.sum(dim=-1, keepdim=True).clamp(min=router.norm_min)

    return RouterRule(selection_scores=scores, weights=weights, scores_differ=True)


def _phimoe(modules: MoeLayerModules) -> RouterRule:
    """Sparsemixer (arXiv:2409.12136) at inference, see `_sparsemixer_weights`."""
    tolerance = 2 * float(modules.router.router_jitter_noise)  # type: ignore[arg-type]

    def weights(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return _sparsemixer_weights(logits.float(), index, tolerance)

    return _plain(weights)


def _sparsemixer_weights(
    logits: torch.Tensor, index: torch.Tensor, tolerance: float
) -> torch.Tensor:
    """Return sparsemixer's weights for an arbitrary set of experts.

    Sparsemixer takes experts one by one: the highest logit m is weighted by its softmax among all
    experts not yet taken whose logit s is near, (m - s) / max(|s|, m) <= tolerance. For an
    arbitrary set this is done in the order of its logits, leaving out experts outside the set that
    outrank the current one. For the model's own choice there are none, so its weights are equal.
    """
    ranked = logits.gather(1, index).argsort(dim=-1, descending=True, stable=True)  # [T, K']
    taken = torch.zeros_like(logits, dtype=torch.bool)  # [T, E]
    weights = torch.zeros(index.shape)
    for rank in range(index.shape[1]):
        position = ranked[:, rank : rank + 1]  # [T, 1]
        expert = index.gather(1, position)  # [T, 1]
        best = logits.gather(1, expert)  # [T, 1]
        is_far = (best - logits) / logits.abs().clamp(min=best) > tolerance
        is_excluded = is_far | taken | (logits > best)
        share = logits.masked_fill(is_excluded, float("-inf")).softmax(dim=-1)  # [T, E]
        weights.scatter_(1, position, share.gather(1, expert))
        taken.scatter_(1, expert, True)
    return weights


def _plain(weights: Weights) -> RouterRule:
    return RouterRule(
        selection_scores=lambda logits: logits.float(), weights=weights, scores_differ=False
    )


def _softmax_among_chosen(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    # softmax over all, divided by the sum of the chosen, is the softmax over the chosen
    return logits.float().gather(1, index).softmax(dim=-1)


def _softmax_among_all(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return logits.float().softmax(dim=-1).gather(1, index)


def _bar_groups(scores: torch.Tensor, group_scores: torch.Tensor, n_allowed: int) -> torch.Tensor:
    """Lower the scores of experts outside the best groups to a finite value below all others.

    Args:
        scores: [T, E].
        group_scores: [T, groups].
        n_allowed: number of best groups.
    """
    n_groups = group_scores.shape[-1]
    allowed = group_scores.topk(n_allowed, dim=-1)[1]  # [T, n_allowed]
    is_allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, allowed, True)
    per_expert = is_allowed.repeat_interleave(scores.shape[-1] // n_groups, dim=-1)  # [T, E]
    floor = scores.amin(dim=-1, keepdim=True) - 1
    return torch.where(per_expert, scores, floor)


_RULES: dict[str, Callable[[MoeLayerModules], RouterRule]] = {
    "mixtral": _softmax_normalized,
    "granitemoe": _softmax_normalized,
    "gpt_oss": _softmax_normalized,
    "hunyuan_v1_moe": _softmax_normalized,
    "qwen2_moe": _softmax_optionally_normalized,
    "qwen3_moe": _softmax_optionally_normalized,
    "olmoe": _softmax_optionally_normalized,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _sigmoid_groups,
    "glm4_moe": _sigmoid_groups,
    "minimax_m2": _minimax_m2,
    "ernie4_5_moe": _ernie,
    "phimoe": _phimoe,
}
