"""Lists of `bench` on the command line."""

import pytest

from moe_tool.benchmarking.bench_plan import parse_policies
from moe_tool.errors import UsageError
from moe_tool.policies.misses import parse_miss_policy


def test_values_go_with_the_policy_before_them():
    words = parse_policies("exact,buddy:rho=1,tau=0.9, buddy:published,rho=4,near-tie:alpha=0.2")
    assert words == ("exact", "buddy:rho=1,tau=0.9", "buddy:published,rho=4", "near-tie:alpha=0.2")
    assert [parse_miss_policy(word).spec.name for word in words] == [
        *("exact", "buddy", "buddy", "near-tie")
    ]


@pytest.mark.parametrize("text", ["", "exact,", "rho=1,exact"])
def test_a_list_that_names_nothing_is_refused(text: str):
    with pytest.raises(UsageError):
        list(map(parse_miss_policy, parse_policies(text)))
