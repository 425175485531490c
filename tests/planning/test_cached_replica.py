"""HOBBIT's caches of two forms in a plan: weights, costs and what a run makes of them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from moe_tool.artifacts.routing import PRIMARY
from moe_tool.budget.request import parse_memory
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.hardware.shipped import shipped_profile
from moe_tool.models.locate import LocatedModel
from moe_tool.planning.build_plan import build_plan
from moe_tool.planning.cached_replica import replay_cached_replica, search_cached_replica
from moe_tool.planning.candidate import Candidate, LossyAnswers, PackedExperts
from moe_tool.planning.eviction_replays import replay_evictions
from moe_tool.planning.hobbit_weights import hobbit
from moe_tool.planning.make_pack_plan import make_pack_plan
from moe_tool.planning.packed_experts import uniform_experts
from moe_tool.planning.plan_request import PlanRequest
from moe_tool.planning.plan_sources import PlanSources, read_sources
from moe_tool.planning.profile_prices import profile_prices
from moe_tool.policies.eviction import CacheShape, ExpertCache, parse_eviction
from moe_tool.policies.misses import PolicyInputs
from moe_tool.policies.misses.replica import unimportance
from moe_tool.profiling.recorder import record_profile
from moe_tool.progress import SILENT
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import generate_ids
from moe_tool.runtime.plan_run import announcements
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from moe_tool.simulator.profile_trace import decode_trace, rows_of_part
from moe_tool.simulator.replay_misses import recorded_routing
from moe_tool.simulator.replica_answers import replica_answers, replica_limits
from moe_tool.simulator.two_caches import naive_replay_two
from moe_tool.text.sources import parse_sources
from tests.packed import pack_bundle

REQUEST = PlanRequest(memory=parse_memory("50%"), context=64, bits="native", max_kl=50.0)
SEQ_LEN = 32


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> LocatedModel:
    return LocatedModel(folder=tiny_checkpoint("mixtral", "bfloat16"), name="tiny")


@pytest.fixture(scope="module")
def profile(model: LocatedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "p.h5"
    record_profile(
        model,
        parse_sources(["builtin"]),
        out=path,
        tokens=512,
        seq_len=SEQ_LEN,
        memory_bytes=8 * 2**30,
    )
    return path


@pytest.fixture(scope="module")
def sources(profile: Path) -> Iterator[PlanSources]:
    with ProfileReader.open(profile) as reader:
        yield read_sources(reader)


@pytest.fixture(scope="module")
def experts(sources: PlanSources) -> PackedExperts:
    return uniform_experts(sources, shipped_profile("laptop-16gb"), REQUEST, "native")


@pytest.fixture(scope="module")
def found(sources: PlanSources, experts: PackedExperts) -> LossyAnswers:
    answers = search_cached_replica(sources, experts, experts.memory.n_slots, max_kl=50.0)
    assert answers is not None
    return answers


def _by_hand(sources: PlanSources, found: LossyAnswers) -> tuple[float, float, float, float]:
    """Return nats, bytes, penalty and hit rate of held-out tokens: the policy itself decides, token
    by token, from what the engine's caches hold."""
    profile, shape = sources.profile, sources.profile.header.shape
    book = profile_prices(sources, "native", found.replicas)
    seen = rows_of_part(profile, "in-sample")
    shares = np.linspace(0, 1, 101)
    tables = {
        layer: np.quantile(
            unimportance(profile.gate_weights(layer)[seen].astype(np.float32)),
            shares,
            method="inverted_cdf",
        )
        for layer in shape.layers
    }
    policy = found.policy.make(
        PolicyInputs(unimportance=tables, forms=("native", found.replicas), prices=book)
    )
    assert found.caches is not None
    caches = [
        ExpertCache(
            lambda shape, low=low: found.caches.eviction.make(  # type: ignore[union-attr, misc]
                CacheShape(
                    n_layers=shape.n_layers,
                    n_experts=shape.n_experts,
                    capacity=shape.capacity,
                    is_cheaper=low,
                )
            ),
            n_layers=len(shape.layers),
            n_experts=shape.experts,
            capacity=slots,
        )
        for low, slots in zip((False, True), found.caches.slots, strict=True)
    ]
    sizes, nats, read, hits, uses = book.record_bytes, 0.0, [0, 0], 0, 0
    rows = rows_of_part(profile, "held-out")
    for row, (at, layer) in product(rows.tolist(), enumerate(shape.layers)):
        if at == 0 and row % SEQ_LEN == 0:
            for cache in caches:
                cache.begin_sequence()
        first = at * shape.experts
        resident = np.array(
            [[first + e in cache for e in range(shape.experts)] for cache in caches]
        )
        stored = np.ones(shape.experts, bool)
        routing = recorded_routing(profile, layer, np.array([row]), stored=stored)
        answers = policy.decide(routing, resident)
        nats += float(book.spent(routing, answers).sum())
        hits += int(resident[PRIMARY, routing.index].sum())
        uses += routing.index.size
        keys = [
            sorted((first + answers.expert[answers.present & (answers.form == form)]).tolist())
            for form in (0, 1)
        ]
        for form, cache in enumerate(caches):
            cache.begin_call(at, elsewhere=keys[1 - form])
            read[form] += len(cache.access(keys[form]))
    n_bytes = read[0] * sizes[0] + read[1] * sizes[1]
    n = len(rows)
    return nats / n, n_bytes / n, n_bytes / sizes[0] / n, hits / uses


def test_costs_are_those_of_the_policy_over_the_engines_caches(
    sources: PlanSources, found: LossyAnswers
) -> None:
    nats, n_bytes, penalty, hit_rate = _by_hand(sources, found)
    replayed, caches = found.replayed, found.caches
    assert nats > 0 and caches is not None
    assert replayed.nats_per_token == pytest.approx(nats)
    assert replayed.bytes_per_token == pytest.approx(n_bytes)
    assert replayed.hit_rate == pytest.approx(hit_rate)
    assert caches.penalties[0].reads_per_token == pytest.approx(penalty)
    assert caches.penalties[0].eviction == caches.eviction.name


def test_no_mix_in_steps_of_a_quarter_costs_less_in_sample(
    sources: PlanSources, found: LossyAnswers
) -> None:
    assert found.caches is not None
    limits = replica_limits(
        sources.profile, found.policy.values["high"], found.policy.values["low"]
    )
    trace = decode_trace(sources.profile, "in-sample")
    answer = replica_answers(sources.profile, "in-sample", limits)
    ratio = found.record_bytes[1] / found.record_bytes[0]
    whole, cheaper = found.caches.slots

    def penalty(eviction):
        counts = naive_replay_two(trace, answer, eviction, capacity=whole, cheaper_capacity=cheaper)
        return counts.penalty(ratio)

    steps = range(0, 101, 25)
    mixes = [
        (lru, lfu, lhu, 100 - lru - lfu - lhu)
        for lru, lfu, lhu in product(steps, repeat=3)
        if lru + lfu + lhu <= 100
    ]
    best = penalty(found.caches.eviction)
    every = [penalty(hobbit(mix, is_reset=True)) for mix in mixes]
    every += [penalty(hobbit(mix, halve_every=128, is_own=True)) for mix in mixes]
    assert len(set(every)) > 1 and best <= min(every)


def test_it_is_judged_beside_lru_lfu_and_random_on_the_rest(
    sources: PlanSources, experts: PackedExperts, found: LossyAnswers
) -> None:
    assert found.caches is not None
    for each in found.caches.penalties:
        eviction = parse_eviction(each.eviction)
        again = replay_cached_replica(
            sources, experts, experts.memory.n_slots, policy=found.policy, eviction=eviction
        )
        assert again is not None
        penalty = again.replayed.bytes_per_token / found.record_bytes[0]
        assert each.reads_per_token == pytest.approx(penalty)
    names = [each.eviction.partition(":")[0] for each in found.caches.penalties]
    assert names == ["hobbit", "lru", "lfu", "lfu", "random"]


def test_caches_are_planned_only_where_answers_may_be_lossy_and_the_limit_is_kept(
    sources: PlanSources, experts: PackedExperts, found: LossyAnswers
) -> None:
    machine = shipped_profile("laptop-16gb")
    assert build_plan(sources, machine, replace(REQUEST, max_kl=None)).penalties == ()
    n_slots = experts.memory.n_slots
    assert search_cached_replica(sources, experts, n_slots, max_kl=0.0) is None
    assert search_cached_replica(sources, experts, experts.n_experts, max_kl=50.0) is None
    report = build_plan(sources, machine, REQUEST)
    assert found.caches is not None and report.penalties == found.caches.penalties
    assert any(note.startswith("caches of native and 4 bits") for note in report.notes)


def test_a_bundle_planned_so_runs_as_planned(
    sources: PlanSources,
    experts: PackedExperts,
    found: LossyAnswers,
    model: LocatedModel,
    profile: Path,
    tmp_path: Path,
) -> None:
    exact = replay_evictions(sources, experts, "50%", SILENT)
    candidate = Candidate(experts=experts, exact=exact, lossy=found)
    machine = shipped_profile("laptop-16gb")
    plan = make_pack_plan(sources, machine, REQUEST, candidate, prefetches=False)
    pack_bundle(model, out=tmp_path / "b", profile=profile, plan=plan)
    with open_session(tmp_path / "b", run_options(memory="50%", context=64)) as session:
        chosen, caches = session.plan, found.caches
        assert caches is not None
        assert (chosen.policy.name, chosen.residency) == (found.policy.name, "cache")
        assert chosen.eviction.name == caches.eviction.name == plan.eviction
        assert tuple(room.n_slots for room in chosen.rooms) == caches.slots
        assert [form.cached for form in plan.forms] == list(caches.slots)
        assert "residency cache" in announcements(chosen, session.manifest)[0]
        generate_ids(session, [[3, 4, 5]], GenerateOptions(max_tokens=12, ignore_eos=True))
        assert session.runner.stats.decode.replica_answers > 0
    others = run_options(memory="50%", context=64, policy="replica:high=0.5")
    with open_session(tmp_path / "b", others) as session:
        assert session.plan.residency == "frozen"
