"""HOBBIT's two caches: compiled replay, penalty held-out, and the shares of `replica`."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe_tool.artifacts.access_trace import AccessTrace
from moe_tool.demo import demo_model_path
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.models.locate import LocatedModel
from moe_tool.native.kernels import is_built
from moe_tool.native.replay import COMPILED
from moe_tool.planning.hobbit_weights import search_hobbit_weights
from moe_tool.policies.eviction import EvictionChoice, parse_eviction
from moe_tool.profiling.recorder import record_profile
from moe_tool.simulator.replica_answers import replica_answers, replica_limits
from moe_tool.simulator.two_caches import (
    CHEAPER,
    NOTHING,
    WHOLE,
    TwoCounts,
    naive_replay_two,
    replay_two_caches,
)
from moe_tool.text.sources import parse_sources
from tests.simulator.random_traces import random_trace, trace_of

needs_compiled = pytest.mark.skipif(not is_built(), reason="the compiled side was not built")
RATIO = 0.25


@needs_compiled
@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        *COMPILED,
        "hobbit:lhu=60,reset=1",
        "hobbit:halve-every=3,fld=5,reset=1",
        "hobbit:own=1",
        "hobbit:fld=70,fld-printed=1",
    ],
)
def test_the_compiled_replay_counts_what_the_caches_themselves_do(name, per_layer):
    choice = parse_eviction(name + (("," if ":" in name else ":") + "per-layer") * per_layer)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        trace = random_trace(
            rng, n_layers=3, n_experts=int(rng.integers(4, 9)), skew=float(rng.choice([0.3, 4]))
        )
        begins = np.zeros(trace.n_calls, bool)
        begins[::3] = rng.random(trace.n_forwards) < 0.2
        trace = replace(trace, begins=begins)
        answer = rng.choice(3, len(trace.keys), p=[0.6, 0.3, 0.1]).astype(np.uint8)
        sizes = {
            "capacity": int(rng.integers(3, trace.n_keys)),
            "cheaper_capacity": int(rng.integers(3, trace.n_keys)),
        }
        found = replay_two_caches(trace, answer, choice, **sizes)
        wanted = naive_replay_two(trace, answer, choice, **sizes)
        for field in ("uses", "misses", "cheaper_uses", "cheaper_misses", "given"):
            assert (getattr(found, field) == getattr(wanted, field)).all(), (seed, field)


def test_the_penalty_counts_a_cheaper_miss_by_its_bytes():
    counts = replace(
        TwoCounts.zeros(2, 0),
        misses=np.array([2, 0], np.uint16),
        cheaper_misses=np.array([1, 3], np.uint16),
    )
    assert counts.penalties(RATIO).tolist() == [2.25, 0.75]
    assert counts.penalty(RATIO) == 3.0


def _texts(rng: np.random.Generator, n_sequences: int) -> tuple[AccessTrace, np.ndarray]:
    """Return sequences of one domain each, and answers.

    Of a layer's 16 experts a domain favours five, some more than others; a token repeats one of the
    last token's experts half of the time.
    """
    n_layers, n_experts, top_k, n_tokens = 4, 16, 2, 80
    odds = np.array([8, 5, 3, 2, 2] + [0.2] * 11)
    domains = [
        [rng.permutation(n_experts) for _ in range(n_layers)] for _ in range(4)
    ]  # expert by place in `odds`
    calls, begins = [], []
    for number in range(n_sequences):
        last: list[list[int]] = [[] for _ in range(n_layers)]
        for token in range(n_tokens):
            for layer, order in enumerate(domains[number % 4]):
                drawn = order[rng.choice(n_experts, top_k, replace=False, p=odds / odds.sum())]
                chosen = drawn.tolist()
                if last[layer] and rng.random() < 0.5 and last[layer][0] not in chosen:
                    chosen[0] = last[layer][0]
                last[layer] = chosen
                calls.append((layer, chosen))
                begins.append(token == 0 and layer == 0)
    trace = trace_of(calls, n_layers=n_layers, n_experts=n_experts)
    answer = rng.choice(3, len(trace.keys), p=[0.67, 0.3, 0.03]).astype(np.uint8)
    return replace(trace, begins=np.array(begins)), answer


@needs_compiled  # the search takes minutes otherwise
@pytest.mark.parametrize("seed", range(3))
def test_searched_weights_cost_less_than_others_on_texts_that_were_not_searched(seed):
    """As published: records begin anew with every sequence, and the others never forget."""
    rng = np.random.default_rng(seed)
    trace, answer = _texts(rng, 24)
    half = trace.n_calls // 2
    at = int(trace.start[half])
    first = replace(
        trace,
        layer=trace.layer[:half],
        start=trace.start[: half + 1],
        keys=trace.keys[:at],
        forward=trace.forward[:half],
        begins=trace.begins[:half],
    )
    rest = replace(
        trace,
        layer=trace.layer[half:],
        start=trace.start[half:] - at,
        keys=trace.keys[at:],
        forward=trace.forward[half:] - trace.forward[half],
        begins=trace.begins[half:],
    )

    def penalty(choice: EvictionChoice, part: AccessTrace, answers: np.ndarray) -> float:
        counts = replay_two_caches(part, answers, choice, capacity=20, cheaper_capacity=16)
        return counts.penalty(RATIO)

    found = search_hobbit_weights(
        lambda choice: penalty(choice, first, answer[:at]), has_cheaper=True, is_reset=True
    )
    held_out = penalty(found, rest, answer[at:])
    others = ("lru", "lfu:halve-every=1000000", "random")
    least = min(penalty(parse_eviction(name), rest, answer[at:]) for name in others)
    print(seed, found.name, held_out, least, penalty(parse_eviction("lfu"), rest, answer[at:]))
    assert held_out <= 0.97 * least


def test_every_layer_of_the_demo_has_the_asked_shares_on_sequences_held_out(
    tmp_path: Path,
) -> None:
    path = tmp_path / "demo.h5"
    record_profile(
        LocatedModel(folder=demo_model_path(), name="demo"),
        parse_sources(["builtin"]),
        out=path,
        tokens=4096,
        seq_len=128,
        memory_bytes=8 * 2**30,
    )
    with ProfileReader.open(path) as profile:
        limits = replica_limits(profile, 0.67, 0.3)
        answers = replica_answers(profile, "held-out", limits)
        n_layers, top_k = len(limits), profile.header.shape.top_k
    by_layer = answers.reshape(-1, n_layers, top_k)
    for at in range(n_layers):
        shares = np.bincount(by_layer[:, at].reshape(-1), minlength=3) / by_layer[:, at].size
        print(at, shares)
        assert shares[WHOLE] == pytest.approx(0.67, abs=0.02)
        assert shares[CHEAPER] == pytest.approx(0.3, abs=0.02)
        assert shares[NOTHING] == pytest.approx(0.03, abs=0.02)
