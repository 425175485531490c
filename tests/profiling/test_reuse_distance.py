"""Reuse distances: by hand, and against a stack that is searched."""

import numpy as np
import pytest

from moe_tool.artifacts.routing_report import ReuseHistogram
from moe_tool.profiling import reuse_distance
from moe_tool.profiling.reuse_distance import merged, reuse_distances, reuse_histogram


def distances(uses: np.ndarray, n_experts: int) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int32), *reuse_distances(uses, n_experts)])


def searched(uses: list[int]) -> list[int]:
    """Mattson's own way: experts in the order of their last use, the most recent first."""
    stack: list[int] = []
    distances = []
    for expert in uses:
        distances.append(stack.index(expert) if expert in stack else -1)
        if expert in stack:
            stack.remove(expert)
        stack.insert(0, expert)
    return distances


def lru_hits(uses: list[int], n_slots: int) -> int:
    """What a cache that drops the least recently used answers, played through."""
    cache: dict[int, None] = {}
    hits = 0
    for expert in uses:
        if expert in cache:
            hits += 1
            del cache[expert]
        elif len(cache) == n_slots:
            del cache[next(iter(cache))]
        cache[expert] = None
    return hits


def counts(histogram: ReuseHistogram) -> list[int]:
    return [one.uses for one in histogram.bins]


def test_by_hand() -> None:
    uses = np.array([0, 1, 0, 0, 2, 3, 1, 3, 0])
    # 0 after 1; 0 at once; 1 after 0, 2, 3; 3 after 1; 0 after 2, 3, 1.
    wanted = [-1, -1, 1, 0, -1, -1, 3, 1, 3]
    assert distances(uses, 5).tolist() == wanted
    histogram = reuse_histogram(uses, n_experts=5)
    assert (histogram.uses, histogram.first_uses) == (9, 4)
    assert [(one.low, one.high, one.uses) for one in histogram.bins] == [
        (0, 0, 1),
        (1, 1, 2),
        (2, 3, 2),
        (4, 7, 0),
    ]


@pytest.mark.parametrize("seed", range(30))
def test_it_is_what_a_searched_stack_gives(seed: int) -> None:
    random = np.random.default_rng(seed)
    n_experts = int(random.integers(1, 40))
    uses = random.integers(0, n_experts, int(random.integers(0, 300)))
    assert distances(uses, n_experts).tolist() == searched(uses.tolist())


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_blocks_make_no_difference(seed: int, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(seed)
    n_experts = int(random.integers(2, 9))
    uses = random.zipf(1.5, 500) % n_experts
    monkeypatch.setattr(reuse_distance, "_BLOCK_USES", 4)  # then 4 * n_experts decides
    found = distances(uses.astype(dtype), n_experts)
    assert found.tolist() == searched(uses.tolist())


def test_the_bins_tell_what_a_cache_of_that_size_answers() -> None:
    uses = (np.random.default_rng(0).zipf(1.3, 2000) % 50).tolist()
    histogram = reuse_histogram(np.array(uses), n_experts=50)
    below = 0
    for one in histogram.bins:
        below += one.uses
        assert below == lru_hits(uses, one.high + 1)
    assert below + histogram.first_uses == histogram.uses == 2000


def test_one_expert_is_always_at_distance_zero() -> None:
    histogram = reuse_histogram(np.zeros(7, np.uint16), n_experts=1)
    assert (histogram.uses, histogram.first_uses, counts(histogram)) == (7, 1, [6])


def test_no_uses_are_no_distances() -> None:
    histogram = reuse_histogram(np.zeros(0, np.uint16), n_experts=4)
    assert (histogram.uses, histogram.first_uses, counts(histogram)) == (0, 0, [0, 0, 0])
    assert distances(np.zeros(0, np.uint16), 4).shape == (0,)


def test_the_last_bin_holds_the_largest_distance() -> None:
    for n_experts in (2, 3, 4, 5, 8, 9):
        uses = np.tile(np.arange(n_experts), 2)
        histogram = reuse_histogram(uses, n_experts=n_experts)
        assert counts(histogram)[-1] == n_experts
        assert histogram.bins[-1].low <= n_experts - 1 <= histogram.bins[-1].high


def test_histograms_add_up() -> None:
    uses = np.random.default_rng(1).integers(0, 6, 100)
    one, other = (reuse_histogram(part, n_experts=6) for part in (uses[:40], uses[40:]))
    both = merged([one, other])
    assert both.uses == 100 and both.first_uses == one.first_uses + other.first_uses
    assert counts(both) == [a + b for a, b in zip(counts(one), counts(other), strict=True)]


def test_a_round_trip_over_more_than_one_real_block() -> None:
    """Round and round over all experts: every distance but the first is the number of others."""
    n_experts = 4096
    uses = np.tile(np.arange(n_experts, dtype=np.uint16), 70)  # 286 720 uses
    histogram = reuse_histogram(uses, n_experts=n_experts)
    assert histogram.first_uses == n_experts
    assert counts(histogram)[-1] == 69 * n_experts
