"""Fit of the routing norm to a profile's trace, with thresholds for one false alarm in a hundred
windows."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moe_tool.artifacts.router_trace import TracedTokens
from moe_tool.artifacts.routing_norm import (
    CHECKED_TOKENS,
    MAX_DOMAINS,
    WINDOW_TOKENS,
    LayerNorm,
    RoutingNorm,
    WindowScore,
    window_score,
)

_STEP_TOKENS = 16
_WATCHED_LOGITS = 768
"""Logits watched in all layers together, so that the section of a large model stays small"""
_N_DIRECTIONS = 32
_N_FOLDS = 4
_FALSE_ALARMS = 0.009
"""Share of cross-fitted windows above the thresholds. The target is one in a hundred; a share
measured on few windows is uncertain"""
_TAIL = 0.2
"""Share of windows from which thresholds are extrapolated"""
_MIN_WINDOWS = 100
"""Fewer in-sample windows, side by side, say nothing about one in a hundred"""
_MAX_WINDOWS = 4096
_ALL_DOMAINS = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Windows:
    """Mean logits of windows of N sequences, P of each, after each of C checks."""

    means: np.ndarray
    """[C, N, P, F] float32 mean logits"""
    domain: np.ndarray
    """[N] int, number of each sequence's domain"""

    def of(self, rows: np.ndarray) -> "_Windows":
        return _Windows(means=self.means[:, rows], domain=self.domain[rows])

    @property
    def whole(self) -> np.ndarray:
        """Whole windows, [N * P, F] float64."""
        means: np.ndarray = self.means[-1].reshape(-1, self.means.shape[-1])
        return means.astype(np.float64)


def watched_experts(n_layers: int, n_experts: int) -> np.ndarray:
    """Return the experts of each layer whose logits are watched: all, or some at even steps."""
    n_watched = min(n_experts, max(2, _WATCHED_LOGITS // n_layers))
    experts: np.ndarray = np.arange(n_watched) * n_experts // n_watched
    return experts


def fit_routing_norm(
    tokens: TracedTokens,
    layers: tuple[int, ...],
    n_experts: int,
    logits: Callable[[int], np.ndarray],
) -> RoutingNorm | None:
    """Fit the norm to in-sample sequences and check it on held-out ones.

    Thresholds come from in-sample windows, each scored by a fit to the other three quarters of the
    sequences: of the scores of windows that a fit has seen, too few are high.

    Args:
        logits: returns the router logits of a layer, [T, E].

    Returns:
        None if the profile has too few windows for thresholds.
    """
    n_sequences, seq_len = tokens.ids.shape
    n_beside = int((~tokens.held_out).sum()) * (seq_len // WINDOW_TOKENS)
    if n_beside < _MIN_WINDOWS:
        return None
    experts = watched_experts(len(layers), n_experts)
    starts = _starts(n_sequences, seq_len)
    parts = [
        _window_means(logits(layer)[:, experts].reshape(n_sequences, seq_len, -1), starts)
        for layer in layers
    ]
    many = len(tokens.domains) > MAX_DOMAINS
    windows = _Windows(
        means=np.concatenate(parts, axis=-1),
        domain=np.zeros(n_sequences, int) if many else tokens.domain.astype(int),
    )
    seen = windows.of(~tokens.held_out)
    domains = (_ALL_DOMAINS,) if many else tokens.domains
    fitted = _fit(seen)
    thresholds = _thresholds(_cross_fitted(seen))
    present = np.unique(seen.domain)
    norm = _norm(
        fitted, thresholds, layers, experts, tuple(domains[i] for i in present), seen.whole.shape[0]
    )
    beside = starts % WINDOW_TOKENS == 0
    held = windows.means[:, tokens.held_out][:, :, beside]  # [C, N, P', F]
    alarms = is_unlike(norm, held.reshape(len(CHECKED_TOKENS), -1, held.shape[-1]))
    return norm.model_copy(
        update={"held_out_windows": len(alarms), "held_out_alarms": int(alarms.sum())}
    )


def is_unlike(norm: RoutingNorm, means: np.ndarray) -> np.ndarray:
    """Return which windows raise an alarm at any check, [N] bool, from mean logits [C, N, F]."""
    score = window_score(norm)
    rated = [score.rate(each.astype(np.float64)) for each in means]
    alarms: np.ndarray = np.any(np.stack(rated) > np.array(norm.thresholds)[:, None], axis=0)
    return alarms


def _starts(n_sequences: int, seq_len: int) -> np.ndarray:
    """Return the positions in a sequence where windows begin: overlapping, unless they would be too
    many."""
    step = _STEP_TOKENS
    while step < WINDOW_TOKENS and n_sequences * (seq_len // step) > _MAX_WINDOWS:
        step *= 2
    return np.arange(0, seq_len - WINDOW_TOKENS + 1, step)


def _window_means(logits: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the mean logits after each check, [C, N, P, F] float32, from [N, S, F]."""
    n_sequences, _, n_values = logits.shape
    shape = (len(CHECKED_TOKENS), n_sequences, len(starts), n_values)
    means = np.empty(shape, np.float32)
    for check, n_tokens in enumerate(CHECKED_TOKENS):
        for position, start in enumerate(starts):
            part = logits[:, start : start + n_tokens]
            means[check, :, position] = part.mean(axis=1, dtype=np.float64)
    return means


def _fit(windows: _Windows) -> WindowScore:
    """Fit means, scales and the directions of most variance.

    Source: factor model with isotropic rest; the maximum-likelihood fit of probabilistic principal
    component analysis (Tipping and Bishop 1999, eq. 7 and 8) on scaled values.
    """
    values = windows.whole  # [M, F]
    labels = np.repeat(windows.domain, windows.means.shape[2])
    present, own = np.unique(labels, return_inverse=True)
    means = _rounded(np.stack([values[labels == domain].mean(axis=0) for domain in present]))
    away = values - means[own]
    scale = _rounded(np.maximum(away.std(axis=0), 1e-3))
    away /= scale
    variance, vectors = np.linalg.eigh(away.T @ away / len(away))  # ascending
    n_directions = min(_N_DIRECTIONS, len(variance) // 2)
    top = np.arange(len(variance) - 1, len(variance) - 1 - n_directions, -1)
    directions = vectors[:, top].T  # [R, F]
    strongest = np.take_along_axis(directions, np.abs(directions).argmax(1)[:, None], axis=1)
    rest = float(np.delete(variance, top).mean())
    return WindowScore(
        scale=scale,
        means=means,
        directions=_rounded(directions * np.sign(strongest)),
        spread=_rounded(np.maximum(variance[top], 1e-6)),
        rest=float(_rounded(np.array(max(rest, 1e-6)))),
    )


def _cross_fitted(windows: _Windows) -> np.ndarray:
    """Return the score of each window after each check, [C, N], by fits to other sequences."""
    fold = np.zeros(len(windows.domain), int)
    for domain in np.unique(windows.domain):
        rows = np.flatnonzero(windows.domain == domain)  # neighbours share documents
        fold[rows] = np.arange(len(rows)) * _N_FOLDS // len(rows)
    rated = []
    for number in np.unique(fold):
        score = _fit(windows.of(fold != number))
        found = windows.means[:, fold == number]
        rated.append(
            [score.rate(each.reshape(-1, each.shape[-1]).astype(np.float64)) for each in found]
        )
    return np.concatenate(rated, axis=1)


def _thresholds(scores: np.ndarray) -> tuple[float, ...]:
    """Return thresholds that the target share of windows stays below at all checks, from [C, N]."""
    single = np.quantile(scores, 1 - _TAIL, axis=1)
    both = _high_quantile((scores / single[:, None]).max(axis=0))
    return tuple(_rounded(single * both).tolist())


def _high_quantile(values: np.ndarray) -> float:
    """Return the value that a share `_FALSE_ALARMS` is above, extrapolated from the largest.

    One odd passage fills the last per cent of a short profile, and would be the threshold itself if
    that were an observed quantile. Source: Weissman 1978, with Hill's estimator of the tail index.
    """
    begin = np.quantile(values, 1 - _TAIL)
    index = float(np.log(values[values > begin] / begin).mean())
    return float(begin * (_TAIL / _FALSE_ALARMS) ** index)


def _norm(
    fitted: WindowScore,
    thresholds: tuple[float, ...],
    layers: tuple[int, ...],
    experts: np.ndarray,
    domains: tuple[str, ...],
    n_windows: int,
) -> RoutingNorm:
    def part(values: np.ndarray, index: int) -> np.ndarray:
        return values[..., index * len(experts) : (index + 1) * len(experts)]

    def rows(values: np.ndarray) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(row) for row in values.tolist())

    return RoutingNorm(
        domains=domains,
        layers=tuple(
            LayerNorm(
                layer=layer,
                experts=tuple(experts.tolist()),
                scale=tuple(part(fitted.scale, index).tolist()),
                means=rows(part(fitted.means, index)),
                directions=rows(part(fitted.directions, index)),
            )
            for index, layer in enumerate(layers)
        ),
        spread=tuple(fitted.spread.tolist()),
        rest=fitted.rest,
        thresholds=thresholds,
        fitted_windows=n_windows,
        held_out_windows=0,
        held_out_alarms=0,
    )


def _rounded(values: np.ndarray) -> np.ndarray:
    """Round to five significant digits, which keeps the manifest short."""
    exact = np.array([float(f"{value:.5g}") for value in values.ravel()])
    return exact.reshape(values.shape)
