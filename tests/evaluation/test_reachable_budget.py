"""What would keep a limit, by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from moe_tool.evaluation.reachable_budget import enough_tokens, least_share
from moe_tool.policies.misses import LayerBook, PriceBook


def _priced(n_experts: int = 10):
    none = np.zeros((n_experts, 0))
    book = PriceBook(
        layers={
            0: LayerBook(
                nats=np.ones(n_experts),
                eps=np.zeros((1, n_experts)),
                record_bytes=np.full((1, n_experts), 4096),
                buddy=none.astype(np.int64),
                buddy_scale=none,
                buddy_eps=none,
            )
        },
    )
    manifest = SimpleNamespace(
        resident_use=None,
        prices=[SimpleNamespace(layer=0, use=[0.1] * n_experts)],
        heat=[SimpleNamespace(layer=0, load=[0.1] * n_experts)],
        primary_records=[None] * n_experts,
        shape=SimpleNamespace(experts=n_experts, layers=(0,), top_k=1),
    )
    return manifest, book


@pytest.mark.parametrize(("max_kl", "expected"), [(0.75, 0.5), (0.11, 1.1), (0.35, 0.9)])
def test_the_least_share_whose_price_keeps_the_limit(max_kl: float, expected: float) -> None:
    # n slots hold n - 2 experts for good, and every other one costs 0.1
    manifest, book = _priced()
    found = least_share(manifest, book, max_kl=max_kl, nats_per_price=1.0)
    if expected > 1:
        assert found is None  # with all ten slots nothing is left free, and nothing is missing
    else:
        assert found == pytest.approx(expected)


def test_a_nat_that_is_worth_more_takes_more_memory() -> None:
    manifest, book = _priced()
    cheap = least_share(manifest, book, max_kl=0.75, nats_per_price=1.0)
    dear = least_share(manifest, book, max_kl=0.75, nats_per_price=1.5)
    assert cheap is not None and dear is not None and dear > cheap


def test_an_interval_shrinks_with_the_root_of_the_text() -> None:
    assert enough_tokens(1000, mean=0.01, upper=0.014, max_kl=0.012) == 4000
    assert enough_tokens(1000, mean=0.013, upper=0.014, max_kl=0.012) is None
