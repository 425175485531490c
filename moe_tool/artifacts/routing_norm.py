"""Norm of a profile's routing: means of router logits over windows of tokens, and their spread.

A window's score is its squared distance to the nearest domain of the profile, in which directions
that vary much from window to window of the same domain count little: see `WindowScore`.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from moe_tool.artifacts.moe_shape import Index
from moe_tool.artifacts.schema import FrozenModel

WINDOW_TOKENS = 64
CHECKED_TOKENS = (32, 64)
"""Tokens of a window after which it is scored; halves of the window"""
MAX_DOMAINS = 16
MAX_DIRECTIONS = 64
MAX_VALUES = 4096
"""Most logits that a window's mean has, over all layers"""
Value = Annotated[float, Field(ge=-1e9, le=1e9)]
Values = Annotated[tuple[Value, ...], Field(min_length=1, max_length=MAX_VALUES)]


class LayerNorm(FrozenModel):
    """Part of one layer in the norm."""

    layer: Index
    experts: Annotated[tuple[Index, ...], Field(min_length=1, max_length=MAX_VALUES)]
    """[F]: experts whose logits are watched, ascending"""
    scale: Annotated[
        tuple[Annotated[float, Field(ge=1e-6, le=1e9)], ...],
        Field(min_length=1, max_length=MAX_VALUES),
    ]
    """[F]: standard deviations of a window's mean logits around its domain's mean"""
    means: Annotated[tuple[Values, ...], Field(min_length=1, max_length=MAX_DOMAINS)]
    """[D][F]: mean logits of each domain"""
    directions: Annotated[tuple[Values, ...], Field(max_length=MAX_DIRECTIONS)]
    """[R][F]: the layer's part of the unit vectors along which scaled means vary most"""

    @model_validator(mode="after")
    def _consistent(self) -> "LayerNorm":
        if list(self.experts) != sorted(set(self.experts)):
            raise ValueError("the watched experts do not ascend")
        if any(
            len(row) != len(self.experts) for row in (self.scale, *self.means, *self.directions)
        ):
            raise ValueError("a row does not fit the watched experts")
        return self


class RoutingNorm(FrozenModel):
    """Section `routing-norm`: how text of the profile's kind is routed, to notice other text."""

    domains: Annotated[
        tuple[Annotated[str, Field(max_length=128)], ...],
        Field(min_length=1, max_length=MAX_DOMAINS),
    ]
    """[D]: names of the means; one name for all where the profile has more than 16 domains"""
    layers: Annotated[tuple[LayerNorm, ...], Field(min_length=1, max_length=MAX_VALUES)]
    spread: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1e9)], ...], Field(max_length=MAX_DIRECTIONS)
    ]
    """[R]: variances along the directions"""
    rest: Annotated[float, Field(ge=1e-9, le=1e9)]
    """Variance along every other direction"""
    thresholds: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1e30)], ...],
        Field(min_length=len(CHECKED_TOKENS), max_length=len(CHECKED_TOKENS)),
    ]
    """Scores above which a window is unlike the profile, after 32 and after 64 tokens"""
    fitted_windows: Annotated[int, Field(ge=1, le=2**40)]
    """In-sample windows that the norm was fitted to; they overlap"""
    held_out_windows: Annotated[int, Field(ge=0, le=2**40)]
    """Windows of held-out sequences, side by side, that the thresholds were checked on"""
    held_out_alarms: Annotated[int, Field(ge=0, le=2**40)]
    """False alarms among them"""

    @model_validator(mode="after")
    def _consistent(self) -> "RoutingNorm":
        if sum(len(layer.experts) for layer in self.layers) > MAX_VALUES:
            raise ValueError("too many logits are watched")
        if len({layer.layer for layer in self.layers}) < len(self.layers):
            raise ValueError("a layer is listed twice")
        for layer in self.layers:
            if len(layer.means) != len(self.domains) or len(layer.directions) != len(self.spread):
                raise ValueError("a layer does not fit the domains and directions")
        if self.held_out_alarms > self.held_out_windows:
            raise ValueError("more false alarms than windows")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowScore:
    """Score of a window's mean logits, in the model that they vary around their domain's mean with
    covariance S (Y + rest I) S: S the scales, Y = sum of (spread - rest) u u^T over directions u.

    The inverse of such a matrix needs no inversion: 1/rest, corrected along each direction.
    """

    scale: np.ndarray
    """[F] float64 standard deviations"""
    means: np.ndarray
    """[D, F] float64 mean logits of each domain"""
    directions: np.ndarray
    """[R, F] float64 directions of most variance, orthonormal rows"""
    spread: np.ndarray
    """[R] float64 variances along them"""
    rest: float
    """Variance along every other direction"""

    def rate(self, windows: np.ndarray) -> np.ndarray:
        """Return the score of each window: squared Mahalanobis distance to the nearest domain, per
        watched logit.

        Args:
            windows: [N, F] float64 mean logits.

        Returns:
            [N] float64, around 1 for text like the profile's.
        """
        correction = 1 / self.spread - 1 / self.rest  # [R]
        nearest = np.full(len(windows), np.inf)
        for mean in self.means:
            away = (windows - mean) / self.scale  # [N, F]
            # einsum sums in one fixed order, whatever the number of threads.
            along = np.einsum("nf,rf->nr", away, self.directions)
            square = np.einsum("nf,nf->n", away, away) / self.rest
            square += np.einsum("nr,nr,r->n", along, along, correction)
            nearest = np.minimum(nearest, square)
        return nearest / len(self.scale)


def window_score(norm: RoutingNorm) -> WindowScore:
    """Return the score of windows whose logits are joined in the order of `norm.layers`."""
    n_values = sum(len(layer.experts) for layer in norm.layers)
    directions = [np.array(layer.directions, float) for layer in norm.layers]
    return WindowScore(
        scale=np.concatenate([np.array(layer.scale, float) for layer in norm.layers]),
        means=np.concatenate([np.array(layer.means, float) for layer in norm.layers], axis=1),
        directions=np.concatenate(directions, axis=1) if norm.spread else np.zeros((0, n_values)),
        spread=np.array(norm.spread, float),
        rest=norm.rest,
    )
