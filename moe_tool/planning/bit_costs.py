"""Expected cost of every width of every expert, as arrays to choose from."""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from moe_tool.artifacts.bit_prices import BitPrices
from moe_tool.artifacts.expert_statistics import PRICED_WIDTHS
from moe_tool.artifacts.identity import require_same_model
from moe_tool.artifacts.precision import NATIVE_WIDTH
from moe_tool.errors import CorruptArtifactError, WrongModelError
from moe_tool.planning.allocate_bits import WIDTHS
from moe_tool.planning.model_costs import native_bits, record_size, useful_widths
from moe_tool.planning.plan_sources import PlanSources
from moe_tool.policies.misses.price_book import STRUCTURED


@dataclass(frozen=True, slots=True, kw_only=True)
class BitCosts:
    """Costs of L layers of E experts at each of W widths."""

    widths: tuple[int, ...]
    """[W] widths that experts may get, ascending, of WIDTHS"""
    bits: tuple[Fraction, ...]
    """[W] bits that an average counts for a weight: the width, or those of the native record"""
    nats: np.ndarray
    """[L, E, W] float64: expected divergence per token"""
    size_bytes: np.ndarray
    """[W] int64: bytes of a record; 0 for a removed expert"""
    load: np.ndarray
    """[L, E] float64: share of tokens that want the expert"""

    @property
    def bit_unit(self) -> Fraction:
        """Largest fraction of a bit that all of `bits` are multiples of"""
        return Fraction(1, math.lcm(*(each.denominator for each in self.bits)))

    @property
    def units(self) -> np.ndarray:
        """[W] int64: `bits` in units of `bit_unit`"""
        return np.array([int(each / self.bit_unit) for each in self.bits], dtype=np.int64)


def bit_costs(sources: PlanSources, prices: BitPrices | None) -> BitCosts:
    """Return the costs by measured errors, or by the profile's errors of rounding to nearest.

    Args:
        prices: bit prices measured with the quantizer in use; None for rtn.

    Raises:
        WrongModelError, CorruptArtifactError: the prices are not of this profile.
    """
    header = sources.profile.header
    shape = header.shape
    if prices is not None:
        _require_fit(prices, sources)
    widths = useful_widths(header, WIDTHS)
    cost = np.zeros((len(shape.layers), shape.experts, len(widths)))
    for at, layer in enumerate(shape.layers):
        each, use = sources.statistics[layer], sources.use[layer].squared_gate
        kl_ratio = 1.0 if prices is None else prices.layers[at].kl_ratio
        eps = {width: each.eps_bits[:, i] for i, width in enumerate(PRICED_WIDTHS)}
        squared = {width: found.astype(np.float64) ** 2 for width, found in eps.items()}
        if prices is None:
            squared[1] = STRUCTURED * squared[1]
        else:
            measured = zip(prices.widths, prices.layers[at].eps, strict=True)
            squared |= {width: np.array(found) ** 2 for width, found in measured}
        squared |= {0: np.full(shape.experts, STRUCTURED), NATIVE_WIDTH: np.zeros(shape.experts)}
        for column, width in enumerate(widths):
            cost[at, :, column] = kl_ratio * each.nats * use * squared[width]
    sizes = [
        0 if width == 0 else record_size(header, "native" if width == NATIVE_WIDTH else str(width))
        for width in widths
    ]
    return BitCosts(
        widths=widths,
        bits=tuple(
            native_bits(header) if width == NATIVE_WIDTH else Fraction(width) for width in widths
        ),
        nats=cost,
        size_bytes=np.array(sizes, dtype=np.int64),
        load=np.stack([sources.use[layer].load for layer in shape.layers]),
    )


def _require_fit(prices: BitPrices, sources: PlanSources) -> None:
    header = sources.profile.header
    remedy = "remove the file: moe-tool plan measures again"
    require_same_model(prices.identity, header.identity, artifact="the bit prices", remedy=remedy)
    if prices.profile_sha256 != sources.profile.sha256:
        raise WrongModelError("the bit prices were measured with another profile", hint=remedy)
    shape = header.shape
    fits = [entry.layer for entry in prices.layers] == list(shape.layers) and all(
        len(row) == shape.experts for entry in prices.layers for row in entry.eps
    )
    if not fits:
        raise CorruptArtifactError(
            "the bit prices do not fit the layers and experts of the profile", hint=remedy
        )
