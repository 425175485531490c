"""The caches of two forms under `replica`: their misses in a run are those of the simulator."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe_tool.artifacts.routing import PRIMARY
from moe_tool.models.locate import LocatedModel
from moe_tool.models.skeleton import LayerCall
from moe_tool.policies.eviction import parse_eviction
from moe_tool.policies.prefetch import Prediction, answer_prediction
from moe_tool.profiling.recorder import record_profile
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import generate_ids
from moe_tool.runtime.moe_layer import Decision
from moe_tool.runtime.prefetcher import Prefetcher
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import Session, open_session
from moe_tool.simulator.two_caches import (
    CHEAPER,
    NOTHING,
    WHOLE,
    Foretold,
    replay_two_caches,
)
from moe_tool.text.sources import parse_sources
from tests.packed import pack_bundle
from tests.simulator.random_traces import trace_of


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    model = LocatedModel(folder=tiny_checkpoint("mixtral"), name="tiny")
    record_profile(
        model,
        parse_sources(["builtin"]),
        out=folder / "tiny.h5",
        tokens=512,
        seq_len=32,
        memory_bytes=8 * 2**30,
    )
    pack_bundle(model, out=folder / "bundle", profile=folder / "tiny.h5", replicas="2")
    return folder / "bundle"


class _Listener:
    """Calls of a session's store, what each expert is answered by if it is missing, and misses."""

    def __init__(self, session: Session) -> None:
        self.calls: list[tuple[int, list[int]]] = []
        self.answers: list[list[int]] = []
        self.misses = {PRIMARY: 0, 1: 0}
        self._session, self._decision = session, None
        self._acquire = session.runner.store.acquire
        session.runner.store.acquire = self._listen  # type: ignore[method-assign]
        self.beginnings: list[int] = []
        self._begin = session.runner.store.begin_sequence
        session.runner.store.begin_sequence = self._begun  # type: ignore[method-assign]
        session.runner.on_decision = self._decided
        self.guesses: list[list[tuple[int, int]]] = []
        """Of every call the predicted (key, answer if missing)"""
        if session.runner.prefetcher is not None:
            self._predictor = session.runner.prefetcher.predictor
            session.runner.prefetcher = Prefetcher(predictor=self)

    def predict(self, at: LayerCall) -> Iterator[Prediction]:
        predictions = list(self._predictor.predict(at))
        policy, shape = self._session.runner.policy.policy, self._session.manifest.shape
        none = np.zeros((2, shape.experts), bool)
        for each in predictions:
            numbers = answer_prediction(each, policy, resident=none).index[0]
            codes = np.where(
                numbers < 0, NOTHING, np.where(numbers < shape.experts, WHOLE, CHEAPER)
            )
            first = shape.layers.index(each.layer) * shape.experts
            ranked = np.argsort(-each.weight[0], kind="stable")
            self.guesses[-1] += [(int(first + each.index[0, k]), int(codes[k])) for k in ranked]
        yield from predictions

    def _begun(self) -> None:
        self.beginnings.append(len(self.calls))
        self._begin()

    def _decided(self, decision: Decision) -> None:
        self._decision = decision

    def _listen(self, layer, numbers, counters, **more):
        position = self._session.manifest.shape.layers.index(layer)
        resident = self._session.runner.store.resident(layer)
        n_experts = resident.shape[1]
        for number in numbers:
            form, expert = divmod(number, n_experts)
            self.misses[form] += not resident[form, expert]
        decision, self._decision = self._decision, None
        wanted = {number: WHOLE for number in numbers}
        if decision is not None:
            none = np.zeros_like(resident)
            answers = self._session.runner.policy.policy.decide(decision.routing, none)
            form = np.where(answers.form == PRIMARY, WHOLE, CHEAPER)
            form = np.where(answers.present, form, NOTHING)
            pairs = zip(decision.routing.index[0].tolist(), form[0].tolist(), strict=True)
            wanted = dict(pairs)
        self.calls.append((position, sorted(wanted)))
        self.guesses.append([])
        self.answers.append([wanted[expert] for expert in sorted(wanted)])
        return self._acquire(layer, numbers, counters, **more)


@pytest.mark.parametrize(
    "eviction",
    ["hobbit", "hobbit:lru=0,lfu=20,lhu=70,fld=10", "hobbit:lru=5,reset=1", "hobbit:halve-every=6",
     "lru", "lfu"],
)  # fmt: skip
def test_misses_of_both_caches_are_those_of_the_simulator(bundle: Path, eviction: str) -> None:
    options = run_options(
        memory="40%",
        policy="replica:high=0.6,low=0.35",
        residency="cache",
        eviction=eviction,
        context=64,
    )
    with open_session(bundle, options) as session:
        rooms, shape = session.plan.rooms, session.manifest.shape
        heard = _Listener(session)
        for first in (3, 40):
            prompt = list(range(first, first + 11))
            generate_ids(session, [prompt], GenerateOptions(max_tokens=16, ignore_eos=True))
    trace = trace_of(heard.calls, n_layers=len(shape.layers), n_experts=shape.experts)
    begins = np.zeros(trace.n_calls, bool)
    begins[heard.beginnings] = True
    assert len(heard.beginnings) == 2
    trace = replace(trace, begins=begins)
    found = replay_two_caches(
        trace,
        np.array([answer for row in heard.answers for answer in row], np.uint8),
        parse_eviction(eviction),
        capacity=rooms[0].n_slots,
        cheaper_capacity=rooms[1].n_slots,
    )
    assert rooms[1].in_step
    misses = (int(found.misses.sum()), int(found.cheaper_misses.sum()))
    assert misses == (heard.misses[PRIMARY], heard.misses[1])
    assert min(misses) > 0


@pytest.mark.parametrize("prefetch", ["next-layer", "stacked:depth=3"])
@pytest.mark.parametrize("eviction", ["hobbit:lru=40,lfu=0,lhu=55,fld=5,reset=1", "lru", "lfu"])
def test_prefetches_of_both_forms_are_those_of_the_simulator(
    bundle: Path, eviction: str, prefetch: str
) -> None:
    options = run_options(
        memory="60%",
        policy="replica:high=0.6,low=0.35,part=0.3",
        residency="cache",
        eviction=eviction,
        prefetch=prefetch,
        context=64,
    )
    with open_session(bundle, options) as session:
        rooms, shape = session.plan.rooms, session.manifest.shape
        heard = _Listener(session)
        before = replace(session.runner.stats.decode)
        for first in (3, 40):
            prompt = list(range(first, first + 11))
            generate_ids(session, [prompt], GenerateOptions(max_tokens=20, ignore_eos=True))
            before = before + session.runner.stats.decode
    trace = trace_of(heard.calls, n_layers=len(shape.layers), n_experts=shape.experts)
    begins = np.zeros(trace.n_calls, bool)
    begins[heard.beginnings] = True
    starts = np.cumsum([0, *map(len, heard.guesses)])
    guesses = [guess for row in heard.guesses for guess in row]
    trace = replace(
        trace,
        begins=begins,
        guess_start=starts.astype(np.int64),
        guesses=np.array([key for key, _ in guesses], np.int32),
    )
    found = replay_two_caches(
        trace,
        np.array([answer for row in heard.answers for answer in row], np.uint8),
        parse_eviction(eviction),
        capacity=rooms[0].n_slots,
        cheaper_capacity=rooms[1].n_slots,
        foretold=Foretold(
            depth=3 if "stacked" in prefetch else 1,
            answer=np.array([answer for _, answer in guesses], np.uint8),
        ),
    )
    misses = (int(found.misses.sum()), int(found.cheaper_misses.sum()))
    assert misses == (heard.misses[PRIMARY], heard.misses[1])
    assert int(found.prefetches.sum()) == before.prefetches > 0
    assert int(found.prefetch_hits.sum()) == before.prefetch_hits > 0
    assert {WHOLE, CHEAPER} <= {answer for _, answer in guesses}
