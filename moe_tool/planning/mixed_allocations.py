"""Allocations of bits to experts: the best over all layers, and controls."""

import math
from collections.abc import Sequence

import numpy as np

from moe_tool.artifacts.bit_prices import Allocation
from moe_tool.artifacts.pack_plan import LayerBits
from moe_tool.planning.allocate_bits import allocate, allocate_by_layer, by_rank, spread_evenly
from moe_tool.planning.bit_costs import BitCosts


def allocate_average(
    costs: BitCosts, average_bits: float, *, room_bytes: int | None = None
) -> np.ndarray:
    """Return the widths' columns with the least loss, [L, E] int64.

    If the experts exceed the memory, one that does not stay resident is read whenever it is wanted,
    and its bytes are charged at the worth of bytes in memory. Heat then counts twice: in the cost
    of an error and in that of a read.

    Args:
        room_bytes: memory for experts; None: all are resident.
    """
    room = _units(costs, average_bits * costs.load.size)
    chosen = _best(costs.nats, costs.units, room)
    if room_bytes is None or costs.size_bytes[chosen].sum() <= room_bytes:
        return chosen
    return _best(costs.nats + _read_costs(costs, chosen, room_bytes), costs.units, room)


def allocate_bytes(costs: BitCosts, room_bytes: int) -> np.ndarray:
    """Return the widths' columns with the least loss that fit in memory, [L, E] int64."""
    return _best(costs.nats, costs.size_bytes, room_bytes)


def allocate_within(costs: BitCosts, max_nats: float) -> np.ndarray:
    """Return the smallest allocation within a limit of loss, [L, E] int64 columns of widths.

    Found by bisection, since the loss falls with the bytes.

    Args:
        max_nats: limit in nats per token, at least 0, which native experts keep.
    """
    n_experts = costs.nats.shape[0] * costs.nats.shape[1]
    step = int(np.gcd.reduce(costs.size_bytes))
    low, high = -1, n_experts * int(costs.size_bytes.max()) // step
    best = allocate_bytes(costs, high * step)
    while high - low > 1:
        middle = (low + high) // 2
        found = allocate_bytes(costs, middle * step)
        if _nats(costs, found) <= max_nats:
            best, high = found, middle
        else:
            low = middle
    return best


def control_allocations(costs: BitCosts, average_bits: float) -> dict[str, np.ndarray]:
    """Return controls with the same bits: name -> [L, E] int64 columns of widths."""
    n_layers, n_experts, n_widths = costs.nats.shape
    n = n_layers * n_experts
    bits = [float(each) for each in costs.bits]
    found: dict[str, np.ndarray] = {}
    by_layer = allocate_by_layer(
        costs.nats,
        np.broadcast_to(costs.units, costs.nats.shape),
        _units(costs, average_bits * n_experts) * n_layers,
    )
    if by_layer is not None:
        found["layer by layer"] = by_layer
    low = max(i for i, each in enumerate(bits) if each <= average_bits)
    high = min(low + 1, n_widths - 1)
    step = bits[high] - bits[low]
    share = 0.0 if step == 0 else (average_bits - bits[low]) / step
    shuffled = np.random.default_rng(0).permutation(n)
    found["by frequency"] = by_rank(np.argsort(-costs.load, axis=None), low, high, share)
    found["uniform"] = spread_evenly(n, low, high, share)
    found["random"] = by_rank(shuffled, low, high, share)
    return {name: chosen.reshape(n_layers, n_experts) for name, chosen in found.items()}


def describe(name: str, costs: BitCosts, chosen: np.ndarray) -> Allocation:
    """Return the figures of an allocation, [L, E] columns of widths."""
    widths, counts = np.unique(np.array(costs.widths)[chosen], return_counts=True)
    total = sum(costs.bits[column] for column in chosen.ravel().tolist())
    return Allocation(
        name=name,
        nats=_nats(costs, chosen),
        experts=dict(zip(widths.tolist(), counts.tolist(), strict=True)),
        average_bits=float(total / chosen.size),
        expert_bytes=int(costs.size_bytes[chosen].sum()),
    )


def layer_bits(costs: BitCosts, layers: Sequence[int], chosen: np.ndarray) -> tuple[LayerBits, ...]:
    """Convert columns of widths to entries of a plan."""
    return tuple(
        LayerBits(layer=layer, bits=tuple(costs.widths[column] for column in row))
        for layer, row in zip(layers, chosen, strict=True)
    )


def _best(cost: np.ndarray, size: np.ndarray, room: int) -> np.ndarray:
    """Return the cheapest columns, [L, E], by [L, E, W] costs and [W] sizes."""
    n_layers, n_experts, n_widths = cost.shape
    found = allocate(
        cost.reshape(-1, n_widths),
        np.broadcast_to(size, (n_layers * n_experts, n_widths)),
        room,
    )
    assert found is not None  # all may be removed
    return found.reshape(n_layers, n_experts)


def _units(costs: BitCosts, bits: float) -> int:
    """Return the units of bits that a limit allows, in spite of its rounding."""
    return math.floor(bits / float(costs.bit_unit) + 1e-6)


def _nats(costs: BitCosts, chosen: np.ndarray) -> float:
    return float(np.take_along_axis(costs.nats, chosen[..., None], axis=2).sum())


def _read_costs(costs: BitCosts, chosen: np.ndarray, room_bytes: int) -> np.ndarray:
    """Return the nats charged for the reads of each choice, [L, E, W]."""
    size = costs.size_bytes[chosen].ravel()
    hottest = np.argsort(-costs.load, axis=None)
    stays = np.zeros(size.shape, dtype=bool)
    stays[hottest] = np.cumsum(size[hottest]) <= room_bytes
    is_read = (~stays).reshape(chosen.shape)
    # A byte in memory is worth the median loss per byte that one step down adds.
    two, three = costs.widths.index(2), costs.widths.index(3)
    saved = float(np.median(costs.nats[..., two] - costs.nats[..., three]))
    per_byte = saved / float(costs.size_bytes[three] - costs.size_bytes[two])
    found: np.ndarray = (is_read * costs.load)[..., None] * costs.size_bytes * per_byte
    return found
