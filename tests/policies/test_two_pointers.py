"""Division of misses by two pointers against the best division, found by trying all."""

from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.policies.two_pointers import count_reads

COST = st.floats(0.01, 10)


@settings(max_examples=200, deadline=None)
@given(n_free=st.integers(0, 10), n_forced=st.integers(0, 4), read=COST, other=COST)
def test_the_longer_way_takes_at_most_one_expert_longer_than_it_must(n_free, n_forced, read, other):
    def makespan(n_reads):
        return max((n_forced + n_reads) * read, (n_free - n_reads) * other)

    # experts are alike in cost, so a division is how many are read
    best = min(makespan(n_reads) for n_reads in range(n_free + 1))
    found = count_reads(n_free, n_forced, read_cost=read, other_cost=other)
    assert 0 <= found <= n_free
    assert makespan(found) <= best + max(read, other) + 1e-9


def test_the_pointers_meet_as_in_the_paper():
    def split(n_free, n_forced=0, read=1.0, other=0.25):
        return count_reads(n_free, n_forced, read_cost=read, other_cost=other)

    assert [split(n) for n in range(7)] == [0, 1, 1, 1, 1, 1, 2]
    assert split(4, 1) == 0  # a read is under way: four replicas take as long
    assert split(5, read=0.0) == 5
    assert split(5, other=0.0) == 1
