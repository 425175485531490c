"""The comparison at equal bytes, by hand."""

from dataclasses import fields

import numpy as np
import pytest

from moe_tool.artifacts.evaluation_report import Estimate, Figures, PolicyRow
from moe_tool.evaluation.equal_bytes import (
    compare_at_equal_bytes,
    dominating,
    priced_settings,
)
from moe_tool.policies.misses import LayerBook, MissChoice, PriceBook, parse_miss_policy


def _parsed(rows: dict[str, Figures]) -> dict[MissChoice, PolicyRow]:
    return {
        parse_miss_policy(name): PolicyRow(policy=name, figures=figures, domains={})
        for name, figures in rows.items()
    }


def _row(n_bytes: float, kl: float, *, spread: float = 0.1, is_alone: bool = False) -> Figures:
    def estimate(value: float, by: float) -> Estimate:
        ci95 = None if is_alone else (value * (1 - by), value * (1 + by))
        return Estimate(value=value, ci95=ci95)

    given = {"bytes_read_per_token": estimate(n_bytes, 0.1), "kl_mean": estimate(kl, spread)}
    return Figures(**{field.name: given.get(field.name, 0) for field in fields(Figures)})


ROWS = {
    "exact": _row(5000, 0.0),
    "priced": _row(0, 0.5),
    "priced:nats-per-mb=0.1": _row(1000, 0.2),
    "priced:nats-per-mb=0.01": _row(3000, 0.05),
    "drop": _row(0, 0.9),
    "near-tie": _row(2999, 0.21),
    "next-ranked": _row(3000, 0.5),
    "replica": _row(500, 0.1),
}


def test_each_is_beside_the_setting_that_reads_most_without_reading_more() -> None:
    found = {each.policy: each for each in compare_at_equal_bytes(_parsed(ROWS))}
    assert list(found) == ["drop", "near-tie", "next-ranked", "replica"]
    assert found["drop"].priced == "priced" and found["drop"].verdict == "beaten"
    assert found["drop"].ratio == pytest.approx(0.5 / 0.9)
    assert found["near-tie"].priced == "priced:nats-per-mb=0.1"
    assert found["near-tie"].verdict == "within intervals"
    assert found["next-ranked"].priced == "priced:nats-per-mb=0.01"
    assert found["next-ranked"].verdict == "beaten"
    assert found["replica"].priced == "priced" and found["replica"].verdict == "beats priced"


def test_what_has_both_fewer_bytes_and_a_lower_kl_is_named() -> None:
    assert dominating(_parsed(ROWS)) == (("replica", "priced:nats-per-mb=0.1"),)
    near = {**ROWS, "replica": _row(500, 0.19)}  # the intervals of KL overlap
    assert dominating(_parsed(near)) == ()
    alone = {"priced": _row(10, 0.2, is_alone=True), "drop": _row(9, 0.19, is_alone=True)}
    assert dominating(_parsed(alone)) == (("drop", "priced"),)


def test_without_prices_there_is_nothing_beside() -> None:
    assert priced_settings(None) == ()
    assert compare_at_equal_bytes(_parsed({"exact": ROWS["exact"], "drop": ROWS["drop"]})) == ()
    exact_alone = {"priced": _row(0, 0.0), "drop": _row(0, 0.0)}
    assert compare_at_equal_bytes(_parsed(exact_alone))[0].ratio is None


def test_settings_lie_around_the_price_of_a_middling_expert() -> None:
    none = np.zeros((2, 0))
    book = PriceBook(
        layers={
            layer: LayerBook(
                nats=np.array([1.0, 3.0]) * layer,
                eps=np.zeros((1, 2)),
                record_bytes=np.full((1, 2), 500_000),
                buddy=none.astype(np.int64),
                buddy_scale=none,
                buddy_eps=none,
            )
            for layer in (1, 3)
        },
    )
    assert book.typical_nats_per_mb == pytest.approx((2 / 4 + 6 / 4) / 2 / 0.5)
    found = priced_settings(book)
    assert found[0].name == "priced:nats-per-mb=0.6" and len(set(found)) == 5
