"""Prices that measured losses correct, and the worth of a read that follows a target."""

import math

import numpy as np
import pytest

from moe_tool.runtime.live_prices import LivePrices, ReadWorth, corrected


def _observe(live, prices, nats, *, times=1):
    for _ in range(times):
        live.begin_token()
        for layer, row in prices.items():
            live.add(layer, np.array(row))
        live.observe(nats, tokens=1)


def test_without_a_measurement_prices_are_bounded_by_half_more():
    live = LivePrices((3, 5), 3)
    assert live.factors(3) == pytest.approx(2 ** (round(8 * math.log2(1.5)) / 8))


@pytest.mark.parametrize("true", [0.2, 1.0, 6.0])
def test_many_measurements_give_the_measured_factor(true):
    live = LivePrices((3, 5), 2)
    _observe(live, {3: [0.01, 0.0], 5: [0.01, 0.0]}, true * 0.02, times=400)
    assert live.factors(3)[0] == pytest.approx(true, rel=0.2)
    assert live.factors(5)[0] == pytest.approx(true, rel=0.2)
    assert live.n_measured == 400


def test_a_class_and_a_layer_that_cost_more_are_told_apart():
    live = LivePrices((3, 5), 2)
    for _ in range(200):
        _observe(live, {3: [0.01, 0.0]}, 0.01)
        _observe(live, {5: [0.0, 0.01]}, 0.06)
    assert live.factors(5)[1] > 4 * live.factors(3)[0]


def test_the_bound_is_above_the_mean_and_falls_with_measurements():
    generator = np.random.default_rng(0)
    losses = generator.exponential(0.02, size=60)
    bounds = []
    for count in (4, 60):
        live = LivePrices((0,), 2)
        for loss in losses[:count]:
            _observe(live, {0: [0.02, 0.0]}, float(loss))
        bounds.append(live.factors(0)[0] / np.mean(losses[:count] / 0.02))
    assert 1 < bounds[1] < bounds[0]


def test_free_answers_and_negative_losses_teach_nothing_wrong():
    live = LivePrices((0,), 2)
    before = live.factors(0).copy()
    _observe(live, {0: [0.0, 0.0]}, 0.5)
    assert (live.factors(0) == before).all()
    _observe(live, {0: [0.01, 0.0]}, -1e-9, times=3)
    assert np.isfinite(live.factors(0)).all() and (live.factors(0) > 0).all()
    live.begin_sequence()
    assert (live.factors(0) == before).all() and live.n_measured == 0


def test_factors_lie_on_a_grid_that_small_differences_do_not_leave():
    live, other = LivePrices((0,), 2), LivePrices((0,), 2)
    _observe(live, {0: [0.01, 0.02]}, 0.05, times=10)
    _observe(other, {0: [0.01, 0.02]}, 0.05 * (1 + 1e-9), times=10)
    assert (live.factors(0) == other.factors(0)).all()
    steps = 8 * np.log2(live.factors(0))
    assert steps == pytest.approx(np.round(steps))


def test_the_worth_of_a_read_follows_the_loss():
    def after(nats, tokens):
        worth = ReadWorth(0.02, 0.01)
        for _ in range(tokens):
            worth.settle(nats)
        return worth.nats_per_mb

    assert after(0.02, 200) < 0.01 < 0.04 < after(0.0, 200)
    assert after(0.008, 200) == pytest.approx(0.02, rel=0.2)
    assert after(0.02, 400) < after(0.02, 200)
    worth = ReadWorth(0.02, 0.01)
    worth.settle(5.0)
    worth.begin_sequence()
    assert worth.nats_per_mb == pytest.approx(0.02)


def test_steering_reaches_its_target_where_the_loss_grows_with_the_worth():
    worth, spent = ReadWorth(0.001, 0.01), []
    for _ in range(600):
        spent.append(0.4 * worth.nats_per_mb)
        worth.settle(spent[-1])
    assert np.mean(spent[200:]) == pytest.approx(0.008, rel=0.1)
    assert max(spent) < 0.02


def test_corrected_prices_are_summed_by_token():
    prices = np.array([[1.0, 2.0], [0.0, 3.0]])
    assert corrected(prices, None).tolist() == [3.0, 3.0]
    assert corrected(prices, np.array([2.0, 0.5])).tolist() == [3.0, 1.5]
