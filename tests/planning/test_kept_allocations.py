"""Mixed bits of a quantized source: kept codes beside fewer bits, against all allocations."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from moe_tool.planning.bit_costs import BitCosts
from moe_tool.planning.mixed_allocations import (
    allocate_average,
    allocate_bytes,
    allocate_within,
    control_allocations,
    describe,
)

WIDTHS = (0, 1, 2, 3, 16)
KEPT_BITS = {
    "mxfp4": Fraction(17, 4),
    "int4 in groups of 32": Fraction(9, 2),
    "fp8 in blocks": 8 + Fraction(1, 512),
}


def costs_of(native: Fraction, seed: int) -> BitCosts:
    """Six experts whose errors fall with the width, each at a pace of its own."""
    rng = np.random.default_rng(seed)
    falls = np.sort(rng.exponential(size=(2, 3, 4)), axis=-1)[..., ::-1]
    bits = tuple(native if width == 16 else Fraction(width) for width in WIDTHS)
    return BitCosts(
        widths=WIDTHS,
        bits=bits,
        nats=np.concatenate([falls, np.zeros((2, 3, 1))], axis=-1),
        size_bytes=np.array([int(4096 * each) for each in bits], dtype=np.int64),
        load=rng.random((2, 3)),
    )


def every_allocation(costs: BitCosts) -> list[tuple[Fraction, float, int]]:
    """Bits, nats and bytes of all 5**6 allocations."""
    nats = costs.nats.reshape(6, 5)
    return [
        (
            sum((costs.bits[k] for k in columns), Fraction(0)),
            sum(float(nats[at, k]) for at, k in enumerate(columns)),
            sum(int(costs.size_bytes[k]) for k in columns),
        )
        for columns in itertools.product(range(5), repeat=6)
    ]


@pytest.mark.parametrize("name", KEPT_BITS)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_other_allocation_of_so_many_bits_loses_less(name: str, seed: int) -> None:
    costs = costs_of(KEPT_BITS[name], seed)
    every = every_allocation(costs)
    mixed = False
    for average in (0.5, 2.5, 3.3, 4.25, 6.0, float(KEPT_BITS[name]), 16.0):
        chosen = allocate_average(costs, average)
        found = describe("found", costs, chosen)
        least = min(nats for bits, nats, _ in every if bits <= Fraction(average) * 6)
        assert found.nats == pytest.approx(least)
        counted = sum(costs.bits[k] for k in chosen.ravel()) / 6
        assert found.average_bits == pytest.approx(float(counted)) and counted <= average
        mixed |= 16 in found.experts and len(found.experts) > 1
        if average >= KEPT_BITS[name]:
            assert found.experts == {16: 6} and found.average_bits == float(KEPT_BITS[name])
    assert mixed


@pytest.mark.parametrize("name", KEPT_BITS)
def test_bytes_and_limits_are_met_by_the_best_too(name: str) -> None:
    costs = costs_of(KEPT_BITS[name], 2)
    every = every_allocation(costs)
    for room in (0, 40_000, 70_000, 120_000):
        found = describe("found", costs, allocate_bytes(costs, room))
        assert found.nats == pytest.approx(min(n for _, n, size in every if size <= room))
    for limit in (0.0, 0.5, 2.0):
        found = describe("found", costs, allocate_within(costs, limit))
        assert found.nats <= limit
        assert found.expert_bytes == min(size for _, n, size in every if n <= limit)


def test_controls_have_the_bits_of_the_average() -> None:
    """3.5 bits lie between 3 and 4.25: two experts of five are kept, of six at most two."""
    costs = costs_of(Fraction(17, 4), 3)
    for name, chosen in control_allocations(costs, 3.5).items():
        found = describe(name, costs, chosen)
        assert found.average_bits <= 3.5
        if name != "layer by layer":
            assert found.experts == {3: 4, 16: 2}
