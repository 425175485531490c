"""Rules that make lists of substitutes: their length, counts of co-activation and scales."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from moe_tool.artifacts.buddy_map import BuddyRules, Similarity
from moe_tool.errors import UsageError

CUMULATIVE_MASS = 0.9
"""Threshold alpha of a public re-implementation; the paper does not state its own."""
Scale = Literal["fitted", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListRules:
    """Rules for the lists of a buddy map. All but `scale` apply to co-activation alone."""

    alpha: float = CUMULATIVE_MASS
    """Cumulative frequency at which a list ends, 0..1"""
    alpha_by_layer: Mapping[int, float] = field(default_factory=dict)
    """Decoder layer -> its alpha instead"""
    weighted: bool = False
    """Whether a token counts a pair by the product of its two shares of the gate weights, not 1"""
    smoothing: float = 0.0
    """Laplace's addition to the count of every pair"""
    warm_up: int = 0
    """Tokens at the head of each sequence that count less"""
    warm_up_weight: float = 0.0
    """Weight of those tokens, 0..1"""
    scale: Scale = "fitted"
    """Factor on a substitute's output: the regression's, or 1"""

    @property
    def counts_anew(self) -> bool:
        """Whether the profile's own co-activation counts do not do."""
        return self.weighted or self.warm_up > 0

    def alpha_of(self, layer: int) -> float:
        """Return the alpha of a decoder layer."""
        return self.alpha_by_layer.get(layer, self.alpha)

    def record(self) -> BuddyRules:
        """Return the rules as a buddy map keeps them."""
        return BuddyRules(
            alpha=float(self.alpha),
            alpha_by_layer=tuple(
                (at, float(self.alpha_of(at))) for at in sorted(self.alpha_by_layer)
            ),
            weighted=self.weighted,
            smoothing=float(self.smoothing),
            warm_up=self.warm_up,
            warm_up_weight=float(self.warm_up_weight),
            scale=self.scale,
        )

    def require_coactivation(self, by: Similarity) -> None:
        """Refuse rules of co-activation for lists by another measure."""
        counted = (self.alpha, self.alpha_by_layer, self.weighted, self.smoothing, self.warm_up)
        if by != "coactivation" and counted != (CUMULATIVE_MASS, {}, False, 0.0, 0):
            raise UsageError(
                f"alpha, weighted, smoothing and warm-up do not apply to lists by {by}",
                hint="add --by coactivation",
            )


def parse_alpha_by_layer(text: str) -> dict[int, float]:
    """Parse "0=0.9,3=0.75": decoder layers and their alpha.

    Raises:
        UsageError: the text is something else, or an alpha is not in 0..1.
    """
    found = {}
    for word in text.split(","):
        layer, _, alpha = word.partition("=")
        try:
            found[int(layer)] = float(alpha)
        except ValueError:
            found[-1] = -1.0
    if not all(layer >= 0 and 0 <= alpha <= 1 for layer, alpha in found.items()):
        raise UsageError(
            f"--alpha-by-layer {text}: not layers with an alpha from 0 to 1",
            hint="write LAYER=ALPHA, with commas between, such as 0=0.9,3=0.75",
        )
    return found
