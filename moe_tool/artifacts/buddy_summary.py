"""Prices of a buddy map's stand-ins, in-sample and held-out."""

from dataclasses import dataclass
from pathlib import Path

from moe_tool.artifacts.json_fields import Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBuddySummary:
    """One layer's row. Prices are means over the experts with a stand-in; 1 if none has one."""

    layer: int
    price_in_sample: float
    """Price of each expert's first stand-in"""
    price_held_out: float
    """Price of the same stand-ins at the same scales, on held-out tokens"""
    price_best_held_out: float
    """Price of the best single stand-in, chosen and scaled in hindsight on the held-out tokens"""
    price_drop: float
    """Price of dropping the expert: 1, or less if some experts output zero"""
    n_without: int
    """Experts that have no stand-in"""
    n_fell_back: int
    """Experts priced on all sampled tokens because too few were routed to them in-sample"""
    n_sampled_held_out: int
    """Tokens behind the held-out prices, which are 1 without any"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuddySummary(Spread):
    """Rows of all layers, with their unweighted means."""

    layers: tuple[LayerBuddySummary, ...]
    price_in_sample: float
    price_held_out: float
    price_best_held_out: float
    price_drop: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BuddyReport:
    """A written buddy map with its summary."""

    buddies: Path
    model: str
    profile: Path
    k: int
    by: str
    summary: BuddySummary
