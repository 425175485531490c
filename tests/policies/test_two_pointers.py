"""Division of misses by two pointers against the best division, found by trying all."""

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.policies.two_pointers import count_reads

COST = st.floats(0.01, 10)


@settings(max_examples=150, deadline=None)
@given(sizes=st.lists(COST, max_size=8), begun=st.floats(0, 20), read=COST, other=COST)
def test_the_longer_way_takes_at_most_one_expert_longer_than_it_must(sizes, begun, read, other):
    """Experts of any sizes, in any order of score; a cost is the size times that of the way."""
    reads, others = [size * read for size in sizes], [size * other for size in sizes]

    def makespan(is_read):
        reading = sum(cost for cost, here in zip(reads, is_read, strict=True) if here)
        answering = sum(cost for cost, here in zip(others, is_read, strict=True) if not here)
        return max(begun + reading, answering)

    best = min(map(makespan, product((True, False), repeat=len(sizes))))
    found = count_reads(reads, others, begun=begun)
    assert 0 <= found <= len(sizes)
    divided = [at < found for at in range(len(sizes))]
    assert makespan(divided) <= best + max([*reads, *others], default=0) + 1e-9


def test_the_pointers_meet_as_in_the_paper():
    def split(n_free, n_forced=0, read=1.0, other=0.25):
        return count_reads([read] * n_free, [other] * n_free, begun=n_forced * read)

    assert [split(n) for n in range(7)] == [0, 1, 1, 1, 1, 1, 2]
    assert split(4, 1) == 0  # a read is under way: four replicas take as long
    assert split(5, read=0.0) == 5
    assert split(5, other=0.0) == 1
