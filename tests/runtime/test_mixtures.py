"""Several primary widths, nested ones among them, removed experts and replicas in one session."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_tool.artifacts.pack_plan import LayerBits
from moe_tool.formats.run_trace_hdf5 import read_run_trace
from moe_tool.hardware.shipped import shipped_profile
from moe_tool.models.architecture import open_model
from moe_tool.models.locate import LocatedModel
from moe_tool.models.skeleton import LayerCall
from moe_tool.planning.compare_run import compare_run
from moe_tool.policies.misses import parse_miss_policy
from moe_tool.profiling.recorder import record_profile
from moe_tool.runtime.generation import GenerateOptions, generate_ids, write_trace
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import Session, open_session
from moe_tool.text.sources import parse_sources
from tests.packed import pack_bundle
from tests.planning.made_plan import made_plan

BITS = (0, 8, "2+2", "2+2", 8, "2+2", 8, "2+2")
"""Of the experts of every layer"""
REMOVED = 0
PROMPT = [256] + [65, 66] * 9


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = LocatedModel(folder=tiny_checkpoint("olmoe", "bfloat16"), name="tiny")
    folder = tmp_path_factory.mktemp("mixture")
    record_profile(model, parse_sources(["builtin"]), out=folder / "p.h5", tokens=512, seq_len=32)
    opened = open_model(model)
    opened.checkpoint.close()
    assert opened.shape.experts == len(BITS)
    entries = tuple(LayerBits(layer=layer, bits=BITS) for layer in opened.shape.layers)
    plan = made_plan(identity=opened.identity, bits="mixed", expert_bits=entries)
    pack_bundle(model, out=folder / "b", plan=plan, replicas="2,1,rank2", profile=folder / "p.h5")
    return folder / "b"


def _open(bundle: Path, memory: str, policy: str = "exact", **options: object) -> Session:
    return open_session(
        bundle,
        run_options(
            memory=memory, policy=policy, context=64, prompt_tokens=32, gates=False, **options
        ),  # type: ignore[arg-type]
    )


def _tokens(session: Session) -> tuple[int, ...]:
    (found,) = generate_ids(
        session, [PROMPT], GenerateOptions(max_tokens=16, ignore_eos=True)
    ).token_ids
    return tuple(found)


def test_what_is_in_memory_changes_no_bit_of_exact_answers(bundle: Path) -> None:
    found = []
    for memory, options in (
        ("100%", {}),
        ("50%", {"eviction": "lfu", "prefetch": "next-layer"}),
        ("min", {}),
        ("50%", {"residency": "frozen"}),
    ):
        with _open(bundle, memory, **options) as session, torch.inference_mode():
            logits = session.model(input_ids=torch.tensor([PROMPT])).logits
            found.append((logits, _tokens(session)))
    for logits, tokens in found[1:]:
        assert torch.equal(logits, found[0][0]) and tokens == found[0][1]


def _replay(calls: Sequence[Sequence[tuple[int, int]]], n_slots: int) -> int:
    """Hits of one pool under least-recently-used, as slowly as can be."""
    cache: OrderedDict[tuple[int, int], None] = OrderedDict()
    n_hits = 0
    for keys in calls:
        hits = [key for key in keys if key in cache]
        n_hits += len(hits)
        for key in keys:
            if key in cache:
                cache.move_to_end(key)
            elif key not in hits:
                if len(cache) == n_slots:
                    others = [held for held in cache if held not in keys]
                    del cache[(others or list(cache))[0]]
                cache[key] = None
    return n_hits


def test_hits_and_misses_are_those_of_a_replay_of_every_pool(bundle: Path) -> None:
    with _open(bundle, "60%") as session:
        calls: list[list[tuple[int, int]]] = []

        def listen(call: LayerCall) -> torch.Tensor:
            named = torch.unique(call.index).tolist()
            calls.append([(call.layer, expert) for expert in named if expert != REMOVED])
            return session.runner(call)

        session.skeleton.set_experts_function(listen)
        _tokens(session)
        stats = session.runner.stats.prompt + session.runner.stats.decode
        n_hits = sum(
            _replay([[key for key in keys if key in table.experts] for keys in calls], room.n_slots)
            for table, room in zip(session.manifest.primaries, session.plan.rooms, strict=False)
        )
    assert stats.hits == n_hits > 0
    assert stats.misses == sum(map(len, calls)) - n_hits > 0


@pytest.mark.parametrize("residency", ["frozen", "cache"])
def test_every_policy_runs_within_the_slots_and_names_nothing_that_is_not_stored(
    residency: str, bundle: Path
) -> None:
    fired, lowered = {}, 0
    with _open(bundle, "50%", residency=residency) as session:
        budget = session.plan.memory
        for policy in (
            "drop",
            "random",
            "next-ranked",
            "near-tie:alpha=1",
            "replica:high=0.2,low=0.6",
            "replica:high=0.2,low=0.6,form=3",
            "replica:high=0,low=1",
            "prune:share=0.9",
            "prune:random",
            "priced:kl=inf",
            "priced:nats-per-mb=100",
        ):
            session.use_policy(parse_miss_policy(policy), residency=residency)  # type: ignore[arg-type]
            named: list[tuple[int, int]] = []
            acquire = session.runner.store.acquire

            def listen(layer, numbers, *args, acquire=acquire, named=named, **options):  # type: ignore[no-untyped-def]
                named += [(layer, number) for number in numbers]
                return acquire(layer, numbers, *args, **options)

            session.runner.store.acquire = listen  # type: ignore[method-assign]
            _tokens(session)
            session.runner.store.acquire = acquire  # type: ignore[method-assign]
            for layer, number in named:
                form, expert = divmod(number, len(BITS))
                assert session.runner.record_bytes[layer][form, expert] > 0
                assert expert != REMOVED
            tables = session.manifest.forms
            taken = sum(
                room.n_slots * table.record_size_bytes
                for room, table in zip(session.plan.rooms, tables, strict=False)
            )
            assert taken <= sum(
                n * table.record_size_bytes for n, table in zip(budget.slots, tables, strict=False)
            )
            stats = session.runner.stats.decode
            fired[policy] = stats.substitutions + stats.replica_answers + stats.drops
            lowered += stats.replica_answers
    assert all(fired.values()), fired
    assert lowered > 0


@pytest.mark.parametrize("prefetch", ["next-layer", "stacked:depth=3"])
def test_a_prefetch_reads_the_form_that_the_policy_would_answer_with(
    bundle: Path, prefetch: str
) -> None:
    read: Counter[int] = Counter()
    policy = "replica:high=0.3,low=0.7,part=0.4"
    with _open(bundle, "60%", policy, residency="cache", prefetch=prefetch) as session:
        store = session.runner.store
        keep = store.prefetch

        def listen(layer: int, numbers: Sequence[int], **named: Any) -> None:
            missing = ~store.resident(layer).reshape(-1)
            assert missing[list(numbers)].all()
            read.update(number // len(BITS) for number in numbers)
            keep(layer, numbers, **named)

        store.prefetch = listen  # type: ignore[assignment,method-assign]
        _tokens(session)
        stats = session.runner.stats.decode
    assert set(read) == {0, 1}
    assert stats.prefetches > 0 and stats.prefetch_hits > 0
    assert stats.bytes_read >= stats.prefetched_bytes > 0


def test_an_account_of_a_mixture_is_finite_and_an_exact_fallback_answers_exactly(
    bundle: Path,
) -> None:
    with _open(bundle, "50%", "priced:kl=inf") as session:
        _tokens(session)
        account = session.runner.account
        assert 0 < account.nats_per_token < np.inf
        account.limit = 0.0
        _tokens(session)
        assert account.exact_tokens > 0


def test_a_trace_with_prefetches_is_replayed_where_experts_were_removed(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = LocatedModel(folder=tiny_checkpoint("mixtral", "bfloat16"), name="tiny")
    opened = open_model(model)
    opened.checkpoint.close()
    bits = (0, 0, *(4,) * (opened.shape.experts - 2))
    entries = tuple(LayerBits(layer=layer, bits=bits) for layer in opened.shape.layers)
    plan = made_plan(identity=opened.identity, bits="mixed", expert_bits=entries)
    pack_bundle(model, out=tmp_path / "b", plan=plan)
    options = run_options(
        memory="60%", context=64, prefetch="next-layer", policy="exact", record_trace=True
    )
    with open_session(tmp_path / "b", options) as session:
        _tokens(session)
        write_trace(session, tmp_path / "run.h5", decode_seconds=1.0)
    header, calls = read_run_trace(tmp_path / "run.h5")
    assert header.prefetches > 0 and header.prefetch_hits > 0
    assert compare_run(header, calls, shipped_profile("laptop-16gb")).is_equal
