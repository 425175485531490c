"""Quality of trained mask routers on held-out text."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from moe_tool.artifacts.bundle_sections import N_QUANTILES, QualityFigure
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.evaluation.bootstrap import bootstrap_interval
from moe_tool.evaluation.divergence import compare_logits
from moe_tool.evaluation.figures import means
from moe_tool.models.skeleton import LayerCall
from moe_tool.policies.misses.prune_learned import rate_offsets
from moe_tool.progress import Progress
from moe_tool.runtime.mask_scores import MaskTensors
from moe_tool.tuning.masked_experts import MaskedExperts
from moe_tool.tuning.train_mask_router import is_prompt, ratio_routers, router_mask, watch_worth


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Verdict:
    """Thresholds and KL on held-out text; prompts are not counted."""

    offsets: np.ndarray
    """[N_QUANTILES] thresholds of the slot score at which 0 %, 5 %, ... of the slots after the
    heaviest are skipped"""
    kl: np.ndarray
    """[N, S-1] KL in nats at the wanted share"""
    kl_by_ratio: np.ndarray
    """[N, S-1] KL in nats of MC's rule at the same share in every layer"""
    left_out: dict[int, float]
    """Layer -> skipped share of its slots after the heaviest"""

    def quality(self, seed: int) -> QualityFigure:
        """Return the mean KL with its 95 % interval over sequences."""
        mean = max(0.0, float(self.kl.mean()))
        low, high = bootstrap_interval(self.kl, means, seed=seed) or (mean, mean)
        return QualityFigure(kl=mean, kl_ci95=(max(0.0, low), max(0.0, high)), tokens=self.kl.size)


def judge_pruning(
    experts: MaskedExperts,
    routers: Mapping[int, MaskTensors],
    shape: MoeShape,
    ids: torch.Tensor,
    *,
    share: float,
    micro_batch: int,
    progress: Progress,
) -> Verdict:
    """Tabulate thresholds by share, then measure KL at one share, also of MC's rule
    (arXiv:2410.06270).

    Args:
        ids: [N, S] int64, held-out token ids.
        share: share of the slots after the heaviest to skip.
        micro_batch: sequences per forward.
    """
    by_ratio = ratio_routers(shape)
    batches = torch.split(ids, micro_batch)
    progress.begin("measure", 2 * len(ids), "sequences")
    learned: dict[int, list[np.ndarray]] = {layer: [] for layer in shape.layers}
    ratios: dict[int, list[np.ndarray]] = {layer: [] for layer in shape.layers}
    for batch in batches:
        for found, each in ((learned, routers), (ratios, by_ratio)):
            for layer, worth in watch_worth(experts, each, batch).items():
                found[layer].append(worth)
        progress.advance(len(batch))
    every = np.concatenate([part for parts in learned.values() for part in parts])
    offsets = rate_offsets(every, np.linspace(0, 1, N_QUANTILES))
    wanted = np.array([share])
    offset = float(np.interp(share, np.linspace(0, 1, N_QUANTILES), offsets))
    limits = {
        layer: float(rate_offsets(np.concatenate(parts), wanted)[0])
        for layer, parts in ratios.items()
    }
    learned_rule = router_mask(routers, lambda _: offset, ids.shape[1])
    counts = {layer: np.zeros(2) for layer in shape.layers}  # skipped slots, all slots

    def counted(call: LayerCall) -> torch.Tensor:
        mask = learned_rule(call)
        light = mask[~is_prompt(len(mask), ids.shape[1]), 1:]
        counts[call.layer] += float((1 - light).sum()), light.numel()
        return mask

    rule = router_mask(by_ratio, lambda layer: limits[layer], ids.shape[1])
    kl, kl_by_ratio = [], []
    for batch in batches:
        with torch.no_grad():
            exact = experts.logits(batch)
            kl.append(_divergence(exact, experts.logits(batch, mask=counted)))
            kl_by_ratio.append(_divergence(exact, experts.logits(batch, mask=rule)))
        progress.advance(len(batch))
    progress.end()
    return Verdict(
        offsets=offsets,
        kl=np.concatenate(kl),
        kl_by_ratio=np.concatenate(kl_by_ratio),
        left_out={layer: float(empty / slots) for layer, (empty, slots) in counts.items()},
    )


def _divergence(exact: torch.Tensor, found: torch.Tensor) -> np.ndarray:
    """Return KL(exact || found) of all predictions but the prompt's, [B, S-1]."""
    rows = [compare_logits(a[1:], b[1:]).kl for a, b in zip(exact, found, strict=True)]
    return np.stack(rows)
