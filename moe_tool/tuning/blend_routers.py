"""How much of what mask routers have learned is kept: chosen on held-out text.

Routers are linear in their parameters, so between the start and the trained ones lie others, whose
slot scores are the same mixture. Much of what a short training learns is noise, of which a mixture
holds less; the start itself is among the choices, so a training that does harm is not kept.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from moe_tool.evaluation.divergence import compare_logits
from moe_tool.policies.misses.prune_learned import rate_offsets
from moe_tool.progress import Progress
from moe_tool.runtime.mask_scores import MaskTensors
from moe_tool.tuning.masked_experts import MaskedExperts
from moe_tool.tuning.train_mask_router import router_mask, watch_worth

BLENDS = (0.125, 0.25, 0.5, 1.0)
"""Shares of the way from the start to the trained routers that are tried beside the start"""
_RATES = (0.6, 1.0, 1.4)
"""Rates to be no worse at, as shares of the wanted one: a run may choose another"""
_MOST_SHARE = 0.95
_LEAST_KL = 1e-12

Routers = Mapping[int, MaskTensors]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Blend:
    """Routers between the start and the trained ones."""

    share: float
    """Share of the way; 0: the start, since no other was better"""
    routers: Routers
    to_start: float
    """KL at the wanted rate over that of the start, on the text that the share was chosen on"""


def choose_blend(
    experts: MaskedExperts,
    start: Routers,
    trained: Routers,
    ids: torch.Tensor,
    *,
    share: float,
    micro_batch: int,
    progress: Progress,
) -> Blend:
    """Return the mixture of least KL relative to the start (geometric mean over three rates) among
    those that are no worse than the start at any of them; the start if there are none.

    Args:
        ids: [N, S] int64, held-out token ids.
        share: wanted share of the slots after the heaviest to skip.
        micro_batch: sequences per forward.
    """
    shares = np.minimum(_MOST_SHARE, share * np.array(_RATES))
    ways = (0.0, *BLENDS)
    candidates = [blended(start, trained, way) for way in ways]
    batches = torch.split(ids, micro_batch)
    progress.begin("choose", 2 * len(ids), "sequences")
    limits = _limits(experts, start, trained, batches, ways, shares, progress)
    totals = np.zeros((len(ways), len(shares)))
    for batch in batches:
        with torch.no_grad():
            exact = experts.logits(batch)
            for at, routers in enumerate(candidates):
                for rate in range(len(shares)):
                    mask = router_mask(routers, _anywhere(limits[at, rate]), ids.shape[1])
                    found = experts.logits(batch, mask=mask)
                    for one, other in zip(exact, found, strict=True):
                        totals[at, rate] += compare_logits(one[1:], other[1:]).kl.sum()
        progress.advance(len(batch))
    progress.end()
    totals = np.maximum(totals, _LEAST_KL)
    best = least_harmful(totals / totals[0])
    return Blend(
        share=ways[best],
        routers=candidates[best],
        to_start=float(totals[best, _RATES.index(1.0)] / totals[0, _RATES.index(1.0)]),
    )


def least_harmful(to_start: np.ndarray) -> int:
    """Return the row of least geometric mean among those that are nowhere above 1.

    Args:
        to_start: [B, R] divergences over those of the first row, by rate.
    """
    score = np.log(to_start).mean(axis=1)
    score[(to_start > 1).any(axis=1)] = np.inf
    score[0] = 0.0
    return int(score.argmin())


def blended(start: Routers, trained: Routers, share: float) -> Routers:
    """Return the routers a share of the way from the start to the trained ones."""
    return {
        layer: MaskTensors(
            **{
                name: torch.lerp(part, trained[layer].parts[name], share)
                for name, part in router.parts.items()
            }
        )
        for layer, router in start.items()
    }


def _anywhere(limit: float) -> Callable[[int], float]:
    return lambda _: float(limit)


def _limits(
    experts: MaskedExperts,
    start: Routers,
    trained: Routers,
    batches: tuple[torch.Tensor, ...],
    ways: tuple[float, ...],
    shares: np.ndarray,
    progress: Progress,
) -> np.ndarray:
    """Return the slot scores below which each mixture skips each share, [B, R]."""
    worth: list[list[np.ndarray]] = [[], []]
    for batch in batches:
        for scores, routers in zip(worth, (start, trained), strict=True):
            scores += watch_worth(experts, routers, batch).values()
        progress.advance(len(batch))
    first, last = (np.concatenate(scores) for scores in worth)
    return np.stack([rate_offsets(first + way * (last - first), shares) for way in ways])
