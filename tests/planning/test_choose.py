"""The choice among candidates, against its definition over all of a small list."""

import itertools
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from moe_tool.budget.request import parse_memory
from moe_tool.errors import UsageError
from moe_tool.planning.candidate import Candidate
from moe_tool.planning.choose import choose, out_of_reach
from moe_tool.planning.plan_request import PlanRequest, check_request


def _candidate(speed: float, bits_nats: float, answer_nats: float | None = None) -> Candidate:
    """A candidate of which only speed and divergence are looked at."""
    experts: Any = SimpleNamespace(nats=bits_nats, bits="4")
    exact: Any = SimpleNamespace(rows=(SimpleNamespace(tokens_per_second=speed),))
    lossy: Any = None
    if answer_nats is not None:
        replayed = SimpleNamespace(nats_per_token=answer_nats)
        lossy = SimpleNamespace(tokens_per_second=speed, replayed=replayed)
        exact.rows[0].tokens_per_second = 1e9  # of no account: misses are not read
    return Candidate(experts=experts, exact=exact, lossy=lossy)


def test_less_divergence_wins_among_those_that_are_nearly_as_fast() -> None:
    fast, near, slow = _candidate(10.0, 0.02), _candidate(9.9, 0.001), _candidate(9.0, 0.0)
    assert choose([fast, near, slow], max_kl=None) is near
    assert choose([fast, slow], max_kl=None) is fast
    assert choose([fast, near, slow], max_kl=0.0005) is slow
    assert choose([fast, near], max_kl=0.0005) is None


def test_bits_and_answers_count_together_against_the_limit() -> None:
    exact, lossy = _candidate(1.0, 0.02), _candidate(50.0, 0.02, 0.03)
    assert lossy.nats_per_token == pytest.approx(0.05)
    assert choose([lossy, exact], max_kl=0.06) is lossy
    assert choose([lossy, exact], max_kl=0.04) is exact


def test_of_equals_the_first_is_taken() -> None:
    twins = [_candidate(5.0, 0.01), _candidate(5.0, 0.01)]
    assert choose(twins, max_kl=1.0) is twins[0]


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_the_one_that_its_definition_leaves(seed: int) -> None:
    draw = random.Random(seed)
    speeds, nats = (100.0, 99.0, 98.0, 97.9, 60.0), (0.0, 0.01, 0.02, 0.05)
    several = [
        _candidate(draw.choice(speeds), draw.choice(nats), draw.choice((None, *nats)))
        for _ in range(draw.randint(1, 6))
    ]
    limit = draw.choice((None, 0.0, 0.015, 0.05))
    found = choose(several, max_kl=limit)
    kept = [each for each in several if limit is None or each.nats_per_token <= limit]
    if not kept:
        assert found is None
        return
    assert found in kept
    for other in kept:
        assert found.tokens_per_second >= 0.98 * other.tokens_per_second
        if other.nats_per_token < found.nats_per_token:
            faster = [o for o in kept if other.tokens_per_second < 0.98 * o.tokens_per_second]
            assert faster


def test_a_limit_that_nothing_keeps_is_refused_with_one_that_is_kept() -> None:
    several = [_candidate(2.0, 0.5), _candidate(9.0, 0.3, 0.4), _candidate(1.0, 0.6)]
    request = PlanRequest(average_bits=1.5, max_kl=0.01)
    sources: Any = None  # mixed widths: no precision is looked for
    error = out_of_reach(several, sources, request)
    assert "0.01" in error.message and "0.5" in error.message and error.hint is not None
    enough = float(error.hint.split("--max-kl ")[1].split(",")[0])
    assert choose(several, max_kl=enough) is several[0]


_GOOD = PlanRequest(memory=parse_memory("1GiB"), max_kl=0.1)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"max_loss": -0.1}, "--max-loss"),
        ({"max_loss": float("nan")}, "--max-loss"),
        ({"context": 0}, "--context"),
        ({"max_kl": -1.0}, "--max-kl"),
        ({"max_kl": float("nan")}, "--max-kl"),
        ({"memory": parse_memory("auto")}, "--memory auto"),
        ({"quantizer": "gptq"}, "mixed bits"),
        ({"bits": "4", "average_bits": 2.0}, "contradict"),
        ({"average_bits": 0.0}, "--average-bits 0"),
        ({"average_bits": float("nan")}, "--average-bits nan"),
        ({"average_bits": 2.0, "memory": parse_memory("50%")}, "no size"),
        ({"bits": "mixed", "memory": parse_memory("min")}, "no size"),
        ({"bits": "mixed", "memory": parse_memory("100%"), "max_kl": None}, "limit of bytes"),
    ],
)
def test_a_request_that_means_nothing_is_refused(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_request(replace(_GOOD, **changed))
    assert says in caught.value.message and caught.value.hint


def test_requests_that_mean_something_are_let_through() -> None:
    memories = ("1GiB", "50%", "100%", "min")
    for memory, bits, max_kl in itertools.product(memories, (None, "4"), (None, 0.0, 0.1)):
        check_request(PlanRequest(memory=parse_memory(memory), bits=bits, max_kl=max_kl))
    mixed = PlanRequest(bits="mixed", quantizer="gptq")
    check_request(replace(mixed, memory=parse_memory("1GiB")))
    check_request(replace(mixed, max_kl=0.1))
    check_request(replace(mixed, average_bits=2.5))
    check_request(replace(mixed, average_bits=2.5, max_kl=0.1))
