"""Mixture Compressor's integer program as printed (Huang et al., arXiv:2410.06270, 2510.10962).

Each layer's experts get 1, 2 or 3 bits with the least sum of frequency^alpha * gate^beta *
error^gamma. A layer's bits add up to exactly its budget, and at least one expert has 3 bits and at
least one 2. The error is the Frobenius norm of what changes in the layer's output when one expert
is quantized.
"""

from dataclasses import dataclass

import numpy as np

from moe_tool.artifacts.bit_prices import BitPrices
from moe_tool.artifacts.expert_statistics import PRICED_WIDTHS
from moe_tool.errors import UsageError
from moe_tool.planning.bit_costs import BitCosts
from moe_tool.planning.plan_sources import PlanSources
from moe_tool.policies.parameters import Parameter, read_values

PUBLISHED_WIDTHS = (1, 2, 3)
EXPECTED_KL = "kl"
_PUBLISHED = "published"
_PARAMETERS = {
    "alpha": Parameter(help="exponent of the share of tokens", default=1, most=8),
    "beta": Parameter(help="exponent of the mean gate weight", default=1, most=8),
    "gamma": Parameter(help="exponent of the error of the layer's output", default=2, most=8),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedCost:
    """Exponents of the program; the defaults are the paper's."""

    alpha: float = 1
    beta: float = 1
    gamma: float = 2


def parse_cost(text: str) -> PublishedCost | None:
    """Parse `--cost`: "kl", which is None, or "published:alpha=1,beta=1,gamma=2".

    Raises:
        UsageError: the cost or a parameter is unknown, or a value is out of range.
    """
    kind, colon, rest = text.strip().partition(":")
    if kind == EXPECTED_KL and not colon:
        return None
    if kind != _PUBLISHED:
        raise UsageError(
            f"--cost {text} is not known", hint="use kl or published:alpha=1,beta=1,gamma=2"
        )
    words = rest.split(",") if rest else []
    return PublishedCost(**read_values(f"--cost {text}", words, _PARAMETERS))


def published_costs(
    sources: PlanSources, prices: BitPrices | None, exponents: PublishedCost
) -> np.ndarray:
    """Return the program's costs, [L, E, 3] by PUBLISHED_WIDTHS.

    The error of a layer's output is put together from the profile: only the quantized expert's
    share changes, by its gate weight times its error. Gate weights and errors of a token are taken
    as independent.

    Args:
        prices: bit prices measured with the quantizer in use; None: the profile's, of rounding to
            nearest.

    Raises:
        UsageError: the prices lack a width.
    """
    measured = PRICED_WIDTHS if prices is None else prices.widths
    missing = [str(width) for width in PUBLISHED_WIDTHS if width not in measured]
    if missing:
        raise UsageError(
            f"--cost published needs errors at 1, 2 and 3 bits, and the bit prices lack "
            f"{' and '.join(missing)}",
            hint="remove the file of bit prices: moe-tool plan measures again",
        )
    columns = [list(measured).index(width) for width in PUBLISHED_WIDTHS]
    found = []
    for at, layer in enumerate(sources.profile.header.shape.layers):
        each = sources.statistics[layer]
        counts, n_tokens = each.in_sample, max(1, each.in_sample.n_tokens)
        eps = each.eps_bits if prices is None else np.array(prices.layers[at].eps).T
        gate_norm = np.sqrt(n_tokens * sources.use[layer].squared_gate)
        norm = gate_norm * each.probe.output_norm.astype(np.float64)  # of the expert's share
        error = norm[:, None] * eps[:, columns].astype(np.float64)
        frequency, gate = counts.load / n_tokens, counts.gate_sum / n_tokens
        weight = frequency**exponents.alpha * gate**exponents.beta
        found.append(weight[:, None] * error**exponents.gamma)
    return np.stack(found)


def allocate_published(costs: BitCosts, published: np.ndarray, average_bits: float) -> np.ndarray:
    """Return the program's columns of `costs.widths`, [L, E] int64, for equal budgets of layers.

    Args:
        published: [L, E, 3] costs by PUBLISHED_WIDTHS.

    Raises:
        UsageError: the budget is not a whole number of bits per layer, or leaves the program no
            solution; or the checkpoint's own codes have so few bits that a width is left out.
    """
    if not set(PUBLISHED_WIDTHS) <= set(costs.widths):
        raise UsageError(
            "--cost published gives experts 1, 2 and 3 bits, and the checkpoint's codes have no "
            "more than that already",
            hint="leave out --cost",
        )
    n_bits = layer_budget(published.shape[1], average_bits)
    chosen = np.stack([solve_layer(cost, n_bits) for cost in published])
    columns = np.array([costs.widths.index(width) for width in PUBLISHED_WIDTHS])
    found: np.ndarray = columns[chosen]
    return found


def nearest_average(n_experts: int, average_bits: float) -> float:
    """Return the nearest average that the program can hit exactly."""
    least, most = n_experts + 3, 3 * n_experts - 1
    return min(max(round(average_bits * n_experts), least), most) / n_experts


def layer_budget(n_experts: int, average_bits: float) -> int:
    """Return the bits of a layer's experts.

    Raises:
        UsageError: they are not whole, or too few or too many for one expert at 3 bits and one at
            2 with no expert below 1 or above 3.
    """
    if n_experts < 2:
        raise UsageError(
            "--cost published needs at least two experts in a layer", hint="leave out --cost"
        )
    nearest = nearest_average(n_experts, average_bits)
    if abs(nearest - average_bits) * n_experts > 0.01:
        raise UsageError(
            f"--average-bits {average_bits:g}: --cost published spends a whole number of bits, "
            f"{n_experts + 3} to {3 * n_experts - 1}, on the {n_experts} experts of a layer",
            hint=f"--average-bits {nearest:.6g}",
        )
    return round(nearest * n_experts)


def solve_layer(cost: np.ndarray, n_bits: int) -> np.ndarray:
    """Return the index of each expert's width with the least sum of costs, [E] int64.

    A dynamic program over the bits spent and over whether an expert at 2 bits, and one at 3, is
    among those already chosen: exact.

    Args:
        cost: [E, 3] by PUBLISHED_WIDTHS, finite.
        n_bits: sum of all experts' bits, E + 3 to 3 E - 1.
    """
    n_experts = len(cost)
    best = np.full((4, n_bits + 1), np.inf)  # the row's bit 0: an expert at 2; bit 1: one at 3
    best[0, 0] = 0
    taken = np.zeros((n_experts, 4, n_bits + 1), dtype=np.int8)  # 4 * width's index + row before
    for expert in range(n_experts):
        following = np.full_like(best, np.inf)
        for index, width in enumerate(PUBLISHED_WIDTHS):
            for before in range(4):
                row = before | (index and 1 << (index - 1))
                total = best[before, : n_bits + 1 - width] + cost[expert, index]
                part = following[row, width:]
                is_better = total < part
                part[is_better] = total[is_better]
                taken[expert, row, width:][is_better] = 4 * index + before
        best = following
    assert np.isfinite(best[3, n_bits])  # layer_budget
    chosen = np.zeros(n_experts, dtype=np.int64)
    row, left = 3, n_bits
    for expert in range(n_experts - 1, -1, -1):
        chosen[expert], row = divmod(int(taken[expert, row, left]), 4)
        left -= PUBLISHED_WIDTHS[chosen[expert]]
    return chosen
