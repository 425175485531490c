"""Every eviction policy in the engine: the same text, and the hits that the simulator counts."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_tool.budget.request import parse_memory
from moe_tool.demo import demo_model_path
from moe_tool.errors import BudgetError, UsageError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.run_trace_hdf5 import is_run_trace, read_run_trace
from moe_tool.hardware.shipped import shipped_profile
from moe_tool.models.locate import LocatedModel
from moe_tool.planning.compare_run import compare_run
from moe_tool.policies.eviction import EVICTION, parse_eviction
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import generate_ids
from moe_tool.runtime.open_stores import open_stores
from moe_tool.runtime.residency import FormRoom
from moe_tool.runtime.run_options import RunOptions, run_options
from moe_tool.runtime.session import open_session
from moe_tool.runtime.write_trace import write_trace
from moe_tool.simulator.naive_replay import naive_replay
from moe_tool.simulator.run_trace import recorded_trace, replay_run
from moe_tool.store.protocol import Supply
from tests.packed import pack_bundle

TinyBundle = Callable[..., Path]
PROMPT = list(range(3, 14))
NAMES = [*EVICTION, "lru:per-layer", "lfu:halve-every=5,per-layer", "smoe:per-layer"]
OPTIONS = run_options(context=64, record_trace=True)
GENERATION = GenerateOptions(max_tokens=16, ignore_eos=True)


def _run(bundle: Path, trace: Path, options: RunOptions) -> tuple[int, ...]:
    with open_session(bundle, options) as session:
        made = generate_ids(session, [PROMPT], GENERATION)
        write_trace(session, trace, decode_seconds=1.0)
    return made.token_ids[0]


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("name", NAMES)
def test_the_text_is_the_same_and_predicted_hits_are_those_counted(
    tiny_bundle: TinyBundle, tmp_path: Path, arch: str, name: str
) -> None:
    bundle, trace = tiny_bundle(arch), tmp_path / "run.h5"
    resident = _run(bundle, trace, replace(OPTIONS, memory=parse_memory("100%")))
    for memory in ("40%", "60%", "80%"):
        options = replace(OPTIONS, memory=parse_memory(memory), eviction=parse_eviction(name))
        assert _run(bundle, trace, options) == resident
        header, calls = read_run_trace(trace)
        report = compare_run(header, calls, shipped_profile("laptop-16gb"))
        assert report.is_equal
        assert header.hits + header.misses == np.diff(calls.start)[calls.is_decode].sum()
        assert header.misses > 0 and header.eviction == name
        # ... and so does the cache itself, replayed without anything compiled.
        choice = parse_eviction(name)
        positions = {layer: at for at, layer in enumerate(header.shape.layers)}
        pinned = [positions[layer] * header.shape.experts + e for layer, e in header.pinned]
        slow = naive_replay(
            recorded_trace(header, calls),
            choice.make,
            capacity=header.n_slots - len(pinned),
            per_layer=choice.per_layer,
            pinned=pinned,
        )
        assert (slow.hits == replay_run(header, calls).hits).all()


@pytest.mark.parametrize("prefetch", ["next-layer", "stacked"])
@pytest.mark.parametrize("name", ["lru", "hobbit", "expertflow", "s3-fifo"])
def test_what_is_read_ahead_is_predicted_too(
    tiny_bundle: TinyBundle, tmp_path: Path, name: str, prefetch: str
) -> None:
    trace = tmp_path / "run.h5"
    options = replace(
        OPTIONS, memory=parse_memory("60%"), eviction=parse_eviction(name), prefetch=prefetch
    )
    _run(tiny_bundle("mixtral"), trace, options)
    header, calls = read_run_trace(trace)
    report = compare_run(header, calls, shipped_profile("laptop-16gb"), [parse_eviction(name)])
    assert report.is_equal and header.prefetches > 0 and header.prefetch_hits > 0
    own, bound = report.policies
    read = (header.misses + header.prefetches) * header.record_size_bytes
    assert own.bytes_per_token == pytest.approx(read / header.decode_tokens)
    assert bound.eviction == "belady, without prefetch"
    counts = replay_run(header, calls)
    assert int(counts.prefetches[calls.is_decode].sum()) == header.prefetches


def test_prefetches_two_layers_ahead_are_predicted_too(tmp_path: Path) -> None:
    model, trace = LocatedModel(folder=demo_model_path(), name="demo"), tmp_path / "run.h5"
    pack_bundle(model, out=tmp_path / "b")
    options = replace(OPTIONS, memory=parse_memory("80%"), prefetch="stacked:depth=3")
    ahead: Counter[int] = Counter()
    with open_session(tmp_path / "b", options) as session:
        assert len(session.manifest.shape.layers) >= 4
        store, called = session.runner.store, [0]
        acquire, prefetch = store.acquire, store.prefetch

        def listen(layer: int, *args: Any, **named: Any) -> Supply:
            called.append(layer)
            return acquire(layer, *args, **named)

        def count(layer: int, numbers: Sequence[int], **named: Any) -> None:
            ahead[layer - called[-1]] += len(numbers)
            prefetch(layer, numbers, **named)

        store.acquire, store.prefetch = listen, count  # type: ignore[method-assign,assignment]
        generate_ids(session, [PROMPT], GENERATION)
        write_trace(session, trace, decode_seconds=1.0)
    header, calls = read_run_trace(trace)
    assert ahead[1] > 0 and ahead[2] > 0
    assert header.prefetches == ahead.total()
    counts = replay_run(header, calls)
    assert int(counts.hits[calls.is_decode].sum()) == header.hits
    assert int(counts.prefetches[calls.is_decode].sum()) == header.prefetches
    assert int(counts.prefetch_hits[calls.is_decode].sum()) == header.prefetch_hits > 0
    slow = naive_replay(
        recorded_trace(header, calls),
        parse_eviction(header.eviction).make,
        capacity=header.n_slots,
        prefetch_depth=3,
    )
    assert (slow.prefetches == counts.prefetches).all() and (slow.hits == counts.hits).all()


def test_a_second_run_of_a_session_counts_from_the_cache_that_the_first_left(
    tiny_bundle: TinyBundle, tmp_path: Path
) -> None:
    trace = tmp_path / "run.h5"
    with open_session(
        tiny_bundle("mixtral"), replace(OPTIONS, memory=parse_memory("60%"))
    ) as session:
        for _ in range(2):
            generate_ids(session, [PROMPT], GENERATION)
        write_trace(session, trace, decode_seconds=1.0)
    header, calls = read_run_trace(trace)
    assert header.n_calls_before * 2 == len(calls.layer)
    report = compare_run(header, calls, shipped_profile("laptop-16gb"), [parse_eviction("fifo")])
    assert report.is_equal and report.prompt_hits > 0
    assert [row.eviction for row in report.policies] == ["fifo", "belady"]
    own = (report.hits) / (header.hits + header.misses)
    assert report.policies[-1].hit_rate >= own


def test_what_cannot_be_is_refused(tiny_bundle: TinyBundle) -> None:
    bundle = tiny_bundle("mixtral")
    refused: tuple[tuple[RunOptions, type[Exception], str], ...] = (
        (run_options(eviction="lfu", residency="frozen"), UsageError, "frozen"),
        (run_options(eviction="lfu", policy="drop"), UsageError, "frozen"),
        (
            run_options(record_trace=True, policy="drop", residency="cache"),
            UsageError,
            "requires --policy exact",
        ),
    )
    for options, error, words in refused:
        with pytest.raises(error, match=words):
            open_session(bundle, options)


def test_a_cache_per_layer_has_a_slot_for_each_layer(tmp_path: Path) -> None:
    """The least memory has a slot more than a token has experts: fewer than the demo has layers."""
    bundle = tmp_path / "bundle"
    pack_bundle(LocatedModel(folder=demo_model_path(), name="demo"), out=bundle, bits="2")
    with open_session(bundle, run_options(memory="min", context=64)) as session:
        shape = session.manifest.shape
        assert session.plan.rooms[0].n_slots == shape.top_k + 1 == len(shape.layers) - 1
    for eviction in ("lru:per-layer", "pinned+lru:per-layer"):
        per_layer = run_options(memory="min", context=64, eviction=eviction)
        with open_session(bundle, per_layer) as session:
            assert session.plan.rooms[0].n_slots == len(shape.layers)
            assert session.plan.rooms[0].pinned == ()


def test_a_store_without_a_slot_for_each_layer_is_refused(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    pack_bundle(LocatedModel(folder=demo_model_path(), name="demo"), out=bundle, bits="2")
    eviction = parse_eviction("lru:per-layer")
    with BundleReader.open(bundle) as reader:
        for n_slots in (3, 4):
            rooms = (FormRoom(n_slots=n_slots, pinned=()),)
            if n_slots < len(reader.manifest.shape.layers):
                with pytest.raises(BudgetError, match="4 layers"):
                    open_stores(reader, rooms, eviction)
            else:
                open_stores(reader, rooms, eviction).close()


def test_what_smoe_remembers_is_in_the_memory_account(tiny_bundle: TinyBundle) -> None:
    def lines(eviction: str) -> dict[str, int]:
        options = run_options(eviction=eviction, memory="100%", context=64)
        with open_session(tiny_bundle("mixtral"), options) as session:
            return {line.name: line.size_bytes for line in session.plan.memory.lines}

    with open_session(tiny_bundle("mixtral"), run_options(context=64)) as session:
        n_experts = len(session.manifest.primary_records)
    assert lines("smoe:window=1024")["eviction state of smoe"] == 2048 * n_experts
    assert "state" not in " ".join(lines("lru"))


def test_the_trace_is_what_it_says(tiny_bundle: TinyBundle, tmp_path: Path) -> None:
    trace = tmp_path / "run.h5"
    _run(tiny_bundle("mixtral"), trace, replace(OPTIONS, memory=parse_memory("50%")))
    assert is_run_trace(trace)
    header, calls = read_run_trace(trace)
    assert header.prompt_tokens == len(PROMPT) and header.decode_tokens == 15
    assert calls.scores is not None and calls.scores.dtype == np.uint16
    shares = calls.scores[calls.is_decode].sum(axis=1) / 2**15
    assert np.abs(shares - 1).max() < 1e-3
    assert torch.is_inference_mode_enabled() is False
