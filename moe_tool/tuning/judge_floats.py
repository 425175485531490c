"""How much of what norms and routers have learned is kept: chosen, then judged, on held-out text.

Every second held-out sequence chooses among mixtures of start and trained tensors the one of least
KL(checkpoint || bundle); the others judge it against the start, sequence by sequence. It is kept
only if the interval of the mean difference lies below zero.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from moe_tool.artifacts.bundle_sections import QualityFigure
from moe_tool.evaluation.bootstrap import bootstrap_interval
from moe_tool.evaluation.figures import means
from moe_tool.models.skeleton import LayerCall
from moe_tool.tuning.float_weights import FloatWeights, Kind, Values
from moe_tool.tuning.streamed_bundle import StreamedBundle

SHARES = (0.0, 0.5, 1.0)
"""Shares of the way from the start to the trained tensors that are tried, by kind"""
LEAST_HELD_OUT = 4
"""Fewest held-out sequences: two to choose by, two to judge by"""

Shares = Mapping[Kind, float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FloatVerdict:
    """Chosen mixture, and whether it pays on text that did not choose it."""

    shares: Shares
    """Kept share of each trained kind; 0 of all if it does not pay"""
    values: Values
    """Tensors to go on with"""
    codes_alone: QualityFigure
    best: QualityFigure
    change_ci95: tuple[float, float]
    """Interval of the mean difference in KL by sequence, nats"""
    rerouted: Mapping[int, float]
    """Layer -> share of the chosen experts that codes alone would not have chosen; of what is
    kept"""


def judge_floats(
    bundle: StreamedBundle, trained: Values, ids: torch.Tensor, *, micro_batch: int, seed: int
) -> FloatVerdict:
    """Choose a mixture and judge it.

    Args:
        trained: tensors behind the training.
        ids: [N, S] int64 held-out token ids, N at least `LEAST_HELD_OUT`.
        micro_batch: sequences per forward.
    """
    floats = bundle.floats
    tried = mixtures(floats)
    ways = [floats.blended(trained, each) for each in tried]
    by_shares = _divergences(bundle, ways, torch.split(ids[::2], micro_batch))
    chosen = tried[int(by_shares.mean(dim=(1, 2)).argmin())]
    best = floats.blended(trained, chosen)
    calls: dict[int, list[torch.Tensor]] = {}
    judged_by = torch.split(ids[1::2], micro_batch)
    found = _divergences(
        bundle, [floats.start, best], judged_by, watch=lambda call: _note(calls, call)
    ).numpy()
    change = found[1].mean(axis=1) - found[0].mean(axis=1)  # [n] by sequence
    low, high = bootstrap_interval(change[:, None], means, seed=seed) or (0.0, 0.0)
    pays = high < 0
    return FloatVerdict(
        shares=chosen if pays else dict.fromkeys(chosen, 0.0),
        values=best if pays else floats.start,
        codes_alone=_quality(found[0], seed),
        best=_quality(found[1], seed),
        change_ci95=(low, high),
        rerouted={
            layer: rerouted_share(*_halves(each)) if pays else 0.0
            for layer, each in sorted(calls.items())
        },
    )


def mixtures(floats: FloatWeights) -> Sequence[Shares]:
    """Return the shares to try, by trained kind; the start first."""
    kinds: list[Kind] = sorted({place.kind for place in floats.places})
    return [dict(zip(kinds, each, strict=True)) for each in product(SHARES, repeat=len(kinds))]


def rerouted_share(before: torch.Tensor, after: torch.Tensor) -> float:
    """Return the share of chosen experts that were not chosen before, of [T, K] int64 each."""
    is_old = (after[:, :, None] == before[:, None, :]).any(dim=2)
    return float((~is_old).float().mean())


def _divergences(
    bundle: StreamedBundle,
    candidates: Sequence[Values],
    batches: Sequence[torch.Tensor],
    *,
    watch: Callable[[LayerCall], None] | None = None,
) -> torch.Tensor:
    """Return KL(checkpoint || bundle) of every prediction, [C, N, S] float64."""
    exact = bundle.exact_states(batches)
    states = bundle.states(batches, candidates, watch=watch)
    found = [
        torch.cat([bundle.divergence(*pair, values) for pair in zip(exact, own, strict=True)])
        for values, own in zip(candidates, states, strict=True)
    ]
    return torch.stack(found).double()


def _note(calls: dict[int, list[torch.Tensor]], call: LayerCall) -> None:
    calls.setdefault(call.layer, []).append(call.index.clone())


def _halves(calls: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the choices of the first and of the second candidate, [T, K] each."""
    middle = len(calls) // 2
    return torch.cat(list(calls[:middle])), torch.cat(list(calls[middle:]))


def _quality(kl: np.ndarray, seed: int) -> QualityFigure:
    """Return the mean of [n, S] with its interval over sequences."""
    mean = max(0.0, float(kl.mean()))
    low, high = bootstrap_interval(kl, means, seed=seed) or (mean, mean)
    return QualityFigure(kl=mean, kl_ci95=(max(0.0, low), max(0.0, high)), tokens=kl.size)
