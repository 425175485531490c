"""A policy over a profile's tokens: against the same sums worked out slot by slot."""

import math
from pathlib import Path

import numpy as np
import pytest

from moe_tool.artifacts.routing import PRIMARY, Routing
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.policies.misses import (
    Gates,
    LayerBook,
    PolicyInputs,
    PriceBook,
    parse_miss_policy,
)
from moe_tool.simulator.profile_trace import rows_of_part
from moe_tool.simulator.replay_misses import replay_misses, resident_masks
from moe_tool.simulator.time_model import CallCosts
from tests.formats import samples

SIZES = (4_000_000, 1_000_000)
COSTS = CallCosts(
    forward_s=0, layer_s=0, expert_s=0.001, read_one_s=0.01, read_s=0.01, waking_s=0, wait_s=1
)


def _book() -> PriceBook:
    rng = np.random.default_rng(3)
    n = samples.EXPERTS
    return PriceBook(
        layers={
            layer: LayerBook(
                nats=rng.uniform(0.5, 2, n),
                eps=np.stack([np.zeros(n), rng.uniform(0.1, 0.5, n)]),
                record_bytes=np.repeat([[SIZES[0]], [SIZES[1]]], n, axis=1),
                buddy=np.zeros((n, 0), dtype=np.int64),
                buddy_scale=np.zeros((n, 0)),
                buddy_eps=np.zeros((n, 0)),
            )
            for layer in samples.LAYERS
        },
    )


@pytest.mark.parametrize("patience", [math.inf, 0.1, 0.001, 0.0])
def test_sums_are_those_of_every_slot_answered_alone(tmp_path: Path, patience: float) -> None:
    book = _book()
    first, second = samples.LAYERS[0], samples.LAYERS[1]
    masks = resident_masks(
        samples.LAYERS, (((first, 0), (second, 1)), ((first, 1),)), n_experts=samples.EXPERTS
    )
    policy = (
        parse_miss_policy("priced")
        .with_value("nats-per-mb", patience)
        .make(PolicyInputs(prices=book))
    )
    nats = read = stall = 0.0
    hits = slots = 0
    with ProfileReader.open(samples.make_profile(tmp_path / "p.h5")) as profile:
        found = replay_misses(profile, "held-out", policy, book, masks, COSTS)
        rows = rows_of_part(profile, "held-out")
        for layer in samples.LAYERS:
            trace, each = profile.trace(layer), book.layers[layer]
            for row in rows:
                of_call, computed = 0.0, 0
                pairs = zip(trace.top_k_index[row], trace.top_k_weight[row], strict=True)
                for expert, weight in pairs:
                    slots += 1
                    whole = each.nats[expert] * float(weight) ** 2
                    if masks[layer][PRIMARY, expert]:
                        hits += 1
                        computed += 1
                        continue
                    here = masks[layer][1, expert]
                    ways = [  # price, bytes, whether it has to wait
                        (0.0, SIZES[0]),
                        (whole * each.eps[1, expert] ** 2, 0 if here else SIZES[1]),
                        (whole, 0),
                    ]
                    costs = [
                        price + (patience * size / 1e6 if size else 0.0) for price, size in ways
                    ]
                    price, size = ways[int(np.argmin(costs))]
                    nats += price
                    of_call += size
                    computed += int(size == 0 and price < whole)
                read += of_call
                stall += max(0.0, of_call / SIZES[0] * 0.01 - computed * 0.001)
    assert found.tokens == len(rows) and found.hit_rate == pytest.approx(hits / slots)
    assert found.nats_per_token == pytest.approx(nats / len(rows), rel=1e-5)
    assert found.bytes_per_token == pytest.approx(read / len(rows))
    assert found.stall_s == pytest.approx(stall / len(rows))
    assert (found.nats_per_token > 0) is (patience >= 0.1)


def test_with_everything_in_memory_nothing_is_read_and_nothing_costs(tmp_path: Path) -> None:
    everybody = tuple((layer, e) for layer in samples.LAYERS for e in range(samples.EXPERTS))
    masks = resident_masks(samples.LAYERS, (everybody, ()), n_experts=samples.EXPERTS)
    drop = parse_miss_policy("drop").make(
        PolicyInputs(gates=Gates(entropy_threshold={}, enabled=False))
    )
    with ProfileReader.open(samples.make_profile(tmp_path / "p.h5")) as profile:
        found = replay_misses(profile, "held-out", drop, _book(), masks, COSTS)
    assert (found.nats_per_token, found.bytes_per_token, found.hit_rate) == (0, 0, 1)
    assert found.answered_otherwise == 0


def test_a_routing_is_the_one_that_a_run_would_see(tmp_path: Path) -> None:
    seen: list[Routing] = []

    class Listening:
        needs_router = "scores"

        def describe(self) -> str:
            return ""

        def decide(self, routing, resident):
            seen.append(routing)
            return parse_miss_policy("exact").make(PolicyInputs()).decide(routing, resident)

    masks = resident_masks(samples.LAYERS, ((), ()), n_experts=samples.EXPERTS)
    with ProfileReader.open(samples.make_profile(tmp_path / "p.h5")) as profile:
        found = replay_misses(profile, "held-out", Listening(), _book(), masks, COSTS)
        rows = rows_of_part(profile, "held-out")
        for routing in seen:
            trace = profile.trace(routing.layer)
            scored = trace.router_logits
            if trace.selection_score is not None:
                scored = trace.selection_score
            np.testing.assert_array_equal(routing.index, trace.top_k_index[rows])
            np.testing.assert_array_equal(routing.score, scored[rows])
            np.testing.assert_array_equal(routing.logits, trace.router_logits[rows])
            assert len(np.unique(routing.sequence)) == len(rows)
    assert [routing.layer for routing in seen] == list(samples.LAYERS)
    assert found.hit_rate == 0 and found.bytes_per_token > 0  # exact reads what is missing
