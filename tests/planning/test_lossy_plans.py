"""What lossy answers are expected to cost, by hand: prices from a profile."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moe_tool.artifacts.precision import KeptPrecision, precision_from_bits
from moe_tool.artifacts.router_trace import mean_squared_gates
from moe_tool.artifacts.routing import PRIMARY
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.planning.profile_prices import nats_of_bits, profile_prices, replicas_below
from moe_tool.policies.cheapest_residents import ExpertUse
from moe_tool.policies.misses.price_book import STRUCTURED
from tests.formats import samples


def _sources(path: Path):
    with ProfileReader.open(samples.make_profile(path)) as profile:
        shape = profile.header.shape
        statistics = {}
        for layer in shape.layers:
            base = profile.statistics(layer)
            eps = np.tile(np.array([0.01, 0.1, 0.2, 0.4, 0.8], np.float32), (shape.experts, 1))
            ratio = np.full(shape.experts, 0.5, np.float32)
            statistics[layer] = replace(
                base,
                eps_bits=eps,
                sensitivity=2.0 + layer,
                probe=replace(base.probe, output_ratio=ratio),
            )
        quarter = np.full(shape.experts, 0.25)
        use = {layer: ExpertUse(squared_gate=quarter, load=quarter) for layer in shape.layers}
        return SimpleNamespace(profile=profile, statistics=statistics, use=use)


def test_a_profiles_prices_are_those_of_its_bits_and_layers(tmp_path: Path) -> None:
    sources = _sources(tmp_path / "p.h5")
    book = profile_prices(sources, "native", "4,2")
    for layer, each in book.layers.items():
        assert each.nats == pytest.approx(
            np.full(samples.EXPERTS, STRUCTURED * (2.0 + layer) * 0.25)
        )
        assert each.eps[PRIMARY].tolist() == [0.0] * samples.EXPERTS
        # what rounding leaves is noise, which costs less than what the nats are of
        assert each.eps[1] ** 2 * STRUCTURED == pytest.approx(0.1**2)
        assert each.eps[2] ** 2 * STRUCTURED == pytest.approx(0.4**2)
    codes = KeptPrecision(codes="e2m1", group_rows=1, group_columns=32, scale="e8m0")
    assert replicas_below(precision_from_bits("4")) == replicas_below(codes) == "3,2,1"
    assert replicas_below(precision_from_bits("native")) == "4,3,2,1"


def test_bits_cost_what_all_their_errors_add_up_to(tmp_path: Path) -> None:
    sources = _sources(tmp_path / "p.h5")
    by_hand = sum(
        samples.EXPERTS * 0.25 * (2.0 + layer) * 0.25 * 0.1**2 for layer in samples.LAYERS
    )
    assert nats_of_bits(sources, "4") == pytest.approx(by_hand)
    assert nats_of_bits(sources, "native") == 0


def test_use_is_the_mean_squared_gate_of_all_tokens() -> None:
    index = np.array([[0, 2], [2, 1], [2, 0], [0, 1]], np.uint16)
    weight = np.array([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5], [0.25, 0.75]], np.float16)
    found = mean_squared_gates(index, weight, 4)
    assert found.tolist() == [(0.25 + 0.25 + 0.0625) / 4, 0.5625 / 4, (0.25 + 1 + 0.25) / 4, 0.0]
