"""The report of a whole profile: counted again from its traces, and where there is little in it."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from moe_tool.artifacts.routing_report import ReuseHistogram, RoutingReport
from moe_tool.formats.profile_hdf5 import ProfileReader, write_layer_part, write_profile
from moe_tool.models.locate import LocatedModel
from moe_tool.profiling.recorder import record_profile
from moe_tool.profiling.routing_report import report_routing
from moe_tool.text.sources import parse_sources
from tests.formats import samples


def report_of(path: Path) -> RoutingReport:
    with ProfileReader.open(path) as profile:
        return report_routing(profile)


def distances(uses: list[tuple[int, int]]) -> list[int]:
    stack: list[tuple[int, int]] = []
    found = []
    for use in uses:
        found.append(stack.index(use) if use in stack else -1)
        if use in stack:
            stack.remove(use)
        stack.insert(0, use)
    return found


def require_histogram(found: ReuseHistogram, wanted: list[int]) -> None:
    assert found.uses == len(wanted) and found.first_uses == wanted.count(-1)
    for one in found.bins:
        assert one.uses == sum(one.low <= distance <= one.high for distance in wanted)
    assert found.first_uses + sum(one.uses for one in found.bins) == found.uses


@pytest.fixture(scope="module")
def profile_path(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Layers 0 and 2 have experts: ten, three chosen."""
    out = tmp_path_factory.mktemp("report") / "p.h5"
    model = LocatedModel(folder=tiny_checkpoint("qwen3_moe"), name="tiny")
    sources = parse_sources(["builtin"])
    record_profile(
        model, sources, out=out, tokens=384, seq_len=24, holdout=0.3, memory_bytes=8 * 2**30
    )
    return out


@pytest.fixture(scope="module")
def profile(profile_path: Path) -> Iterator[ProfileReader]:
    with ProfileReader.open(profile_path) as reader:
        yield reader


def test_reuse_follows_tokens_then_layers(profile: ProfileReader) -> None:
    report, tokens = report_routing(profile), profile.tokens
    held_out = np.flatnonzero(np.repeat(tokens.held_out, tokens.ids.shape[1]))
    traces = {layer: profile.trace(layer) for layer in profile.layers}
    assert profile.layers == (0, 2) and len(held_out) > 0
    uses = [
        (layer, int(expert))
        for row in held_out
        for layer in profile.layers
        for expert in traces[layer].top_k_index[row]
    ]
    require_histogram(report.reuse, distances(uses))
    within = []
    for one in report.layers:
        own = distances([use for use in uses if use[0] == one.layer])
        require_histogram(one.reuse, own)
        within += own
    require_histogram(report.reuse_within_layer, within)


def test_next_gates_are_those_of_the_layer_before(profile: ProfileReader) -> None:
    report, tokens = report_routing(profile), profile.tokens
    rows = np.repeat(tokens.held_out, tokens.ids.shape[1])
    named, chosen = profile.trace(0).next_gate_index[0], profile.trace(2).top_k_index
    first, second = report.layers
    assert first.next_gate == ()
    (found,) = second.next_gate
    assert (found.depth, found.from_layer) == (1, 0)
    for prediction, part in ((found.in_sample, ~rows), (found.held_out, rows)):
        hits = [
            expert in named[row] for row in np.flatnonzero(part) for expert in chosen[row].tolist()
        ]
        assert prediction is not None and prediction.n_tokens == part.sum()
        assert prediction.share == pytest.approx(np.mean(hits))
    assert [row.depth for row in report.next_gate] == [1]
    assert report.next_gate[0].held_out == found.held_out


def test_hot_sets_and_unions_are_of_the_layer_that_they_name(profile: ProfileReader) -> None:
    report, tokens = report_routing(profile), profile.tokens
    n_sequences, seq_len = tokens.ids.shape
    for one in report.layers:
        chosen = profile.trace(one.layer).top_k_index.reshape(n_sequences, seq_len, -1)
        load = np.bincount(chosen[~tokens.held_out].reshape(-1), minlength=10)
        outside = np.bincount(chosen[tokens.held_out].reshape(-1), minlength=10)
        best = np.argsort(-load, kind="stable")[:5]
        half = one.hot_sets[2]
        assert half.in_sample == pytest.approx(load[best].sum() / load.sum())
        assert half.held_out == pytest.approx(outside[best].sum() / outside.sum())
        pairs = [
            len(set(sequence[start : start + 2].reshape(-1).tolist())) / 3
            for sequence in chosen
            for start in range(seq_len - 1)
        ]
        assert one.union_growth.measured[1] == pytest.approx(np.mean(pairs))
    halves = [one.hot_sets[2].held_out for one in report.layers]
    assert report.hot_sets[2].held_out == pytest.approx(np.mean(halves))
    assert report.domains == tokens.domains and len(report.domains) > 1


def made(path: Path, held_out: list[bool]) -> Path:
    """The tiny profile with other sequences held out."""
    parts = {}
    for position, layer in enumerate(samples.LAYERS):
        parts[layer] = path.with_name(f"{layer}.part.h5")
        trace = samples.trace(len(samples.LAYERS) - 1 - position, layer)
        statistics = samples.statistics(layer)
        if not any(held_out):
            empty = dataclasses.replace(
                statistics.held_out,
                n_tokens=0,
                load=np.zeros(samples.EXPERTS, np.int64),
                domain_load=np.zeros((samples.D, samples.EXPERTS), np.int64),
            )
            statistics = dataclasses.replace(statistics, held_out=empty)
        write_layer_part(parts[layer], layer, trace, statistics)
    tokens = dataclasses.replace(samples.tokens(), held_out=np.array(held_out))
    sensitivities = dict.fromkeys(samples.LAYERS, 0.5)
    write_profile(path, samples.header(), tokens, parts, sensitivities, sensitivity_n_tokens=8)
    return path


def test_nothing_held_out_is_none_and_not_a_number_that_means_nothing(tmp_path: Path) -> None:
    report = report_of(made(tmp_path / "p.h5", [False, False]))
    assert report.reuse.uses == report.reuse_within_layer.uses == 0
    assert report.hot_sets[0].held_out is None and report.hot_sets[0].best_per_sequence is None
    assert report.hot_sets[0].in_sample is not None and report.hot_sets[0].domains is None
    assert report.next_gate[0].held_out is None
    assert report.next_gate[0].in_sample is not None
    assert report.next_gate[0].in_sample.n_tokens == 8
    assert report.union_growth.measured[3] is not None  # four tokens in a sequence
    assert report.union_growth.measured[4:] == (None,) * 4


def test_everything_held_out_has_no_in_sample_prediction(tmp_path: Path) -> None:
    report = report_of(made(tmp_path / "p.h5", [True, True]))
    assert report.next_gate[0].in_sample is None
    assert report.reuse.uses == 2 * 8 * samples.TOP_K


def test_a_report_is_plain_numbers(profile: ProfileReader) -> None:
    def walk(value: object) -> None:
        if isinstance(value, dict):
            for key, entry in value.items():
                assert isinstance(key, str)
                walk(entry)
        elif isinstance(value, tuple | list):
            for entry in value:
                walk(entry)
        else:
            assert value is None or type(value) in (int, float, str), value
            assert value == value

    walk(asdict(report_routing(profile)))
