"""Looking ahead from part of a layer: nothing but prefetches changes, and these are counted."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from moe_tool.errors import UsageError
from moe_tool.formats.run_trace_hdf5 import read_run_trace
from moe_tool.hardware.shipped import shipped_profile
from moe_tool.models.skeleton import LayerCall
from moe_tool.planning.compare_run import compare_run
from moe_tool.policies.eviction import parse_eviction
from moe_tool.policies.prefetch import Prediction
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import generate_ids
from moe_tool.runtime.partial_layer import PartialLayer
from moe_tool.runtime.prefetcher import Prefetcher
from moe_tool.runtime.run_options import RunOptions, run_options
from moe_tool.runtime.session import Session, open_session
from moe_tool.runtime.write_trace import write_trace
from moe_tool.simulator.run_trace import replay_run
from tests.runtime.test_prefetch import PROMPTS, _Replay
from tests.tiny_models import TINY

TinyBundle = Callable[..., Path]
REFUSED = {
    "qwen3_moe": "no decoder layer with experts follows another",
    "granitemoe": "decoder layer 0 is not two residual blocks",
    "gpt_oss": "attend in different ways",
}


def _options(memory: str, prefetch: str) -> RunOptions:
    return run_options(memory=memory, prefetch=prefetch, context=64, prompt_tokens=32, batch=2)


@torch.inference_mode()
def _decode(session: Session, n_sequences: int = 2) -> tuple[torch.Tensor, DynamicCache]:
    """Logits of single tokens after a prompt, [B, 12, V], and the KV cache."""
    cache, rows = session.new_cache(), []
    session.model(input_ids=torch.tensor([PROMPTS[0]] * n_sequences), past_key_values=cache)
    for token in range(70, 82):
        ids = torch.tensor([[token], [token + 50]])[:n_sequences]
        rows.append(session.model(input_ids=ids, past_key_values=cache).logits)
    return torch.cat(rows, dim=1), cache


class _Spy:
    """A predictor that keeps what another one predicts."""

    def __init__(self, session: Session) -> None:
        self._prefetcher = session.runner.part_prefetcher
        assert self._prefetcher is not None
        self.predictor = self._prefetcher.predictor
        self.latest: list[Prediction] = []
        session.runner.part_prefetcher = Prefetcher(predictor=self, close=self._prefetcher.close)

    def predict(self, at: PartialLayer) -> Iterator[Prediction]:
        self.latest = list(self.predictor.predict(at))
        yield from self.latest


@pytest.mark.parametrize("arch", sorted(TINY.keys() - REFUSED.keys()))
def test_a_whole_layer_foretells_the_next_routers_input(arch: str, tiny_bundle: TinyBundle) -> None:
    with open_session(tiny_bundle(arch), _options("100%", "partial")) as session:
        spy, compared = _Spy(session), 0
        ahead = spy.predictor.ahead  # type: ignore[attr-defined]
        ours: dict[int, torch.Tensor] = {}

        def compare(call: LayerCall) -> torch.Tensor:
            nonlocal compared
            if (expected := ours.pop(call.layer, None)) is not None:
                torch.testing.assert_close(expected, call.routed_hidden, rtol=1e-4, atol=1e-4)
                compared += 1
            output = session.runner(call)
            seen = ahead.router_input(call.layer, output)
            if seen is not None:
                ours[call.layer + 1] = seen
            return output

        session.skeleton.set_experts_function(compare)
        _decode(session)
        assert compared == 13 * len(ahead.next) > 0


@pytest.mark.parametrize("arch", REFUSED)
def test_other_layers_are_refused_before_anything_is_loaded(
    arch: str, tiny_bundle: TinyBundle
) -> None:
    with pytest.raises(UsageError, match=f"cannot look ahead.*{REFUSED[arch]}") as error:
        open_session(tiny_bundle(arch), _options("100%", "partial"))
    assert error.value.hint == "--prefetch next-layer"


@pytest.mark.parametrize("bits", ["native", "4"])
@pytest.mark.parametrize("arch", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_neither_logits_nor_kv_cache_change(arch: str, bits: str, tiny_bundle: TinyBundle) -> None:
    bundle = tiny_bundle(arch, bits=bits)
    with open_session(bundle, _options("100%", "none")) as session:
        expected, held = _decode(session)
    for memory in ("min", "40%", "70%") if bits == "native" else ("40%",):
        with open_session(bundle, _options(memory, "partial:alpha=0")) as session:
            logits, cache = _decode(session)
            decode, prompt = session.runner.stats.decode, session.runner.stats.prompt
        assert torch.equal(logits, expected)
        assert cache.get_seq_length() == held.get_seq_length()
        for ours, theirs in zip(cache.layers, held.layers, strict=True):
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        assert prompt.prefetches == 0 and decode.prefetches >= decode.prefetch_hits
        assert decode.prefetch_hits > 0 or memory != "40%"


@pytest.mark.parametrize("memory", ["min", "40%", "70%"])
def test_counts_equal_those_of_a_naive_replay(memory: str, tiny_bundle: TinyBundle) -> None:
    options = replace(_options(memory, "partial:alpha=0.1"), batch=1)
    with open_session(tiny_bundle("mixtral"), options) as session:
        spy, replay = _Spy(session), _Replay(session.plan.memory.n_slots)

        def replay_and_run(call: LayerCall) -> torch.Tensor:
            wanted = [(call.layer, expert) for expert in torch.unique(call.index).tolist()]
            replay.call(wanted)
            spy.latest = []
            output = session.runner(call)
            for each in spy.latest:
                best = sorted(zip(-each.weight[0], each.index[0].tolist(), strict=True))
                replay.expect(wanted, [(each.layer, e) for _, e in best if e >= 0])
            return output

        session.skeleton.set_experts_function(replay_and_run)
        _decode(session, 1)
        prompt, decode = session.runner.stats.prompt, session.runner.stats.decode
    assert prompt.hits + decode.hits == replay.hits
    assert prompt.misses + decode.misses == replay.misses
    assert decode.prefetches == replay.prefetches > 0
    assert decode.prefetch_hits == replay.prefetch_hits


def test_a_closed_session_leaves_no_hook(tiny_bundle: TinyBundle) -> None:
    with open_session(tiny_bundle("mixtral"), _options("40%", "partial")) as session:
        layer = session.model.model.layers[0]
        assert layer._forward_pre_hooks and layer._forward_hooks
    assert not layer._forward_pre_hooks and not layer._forward_hooks
    assert not layer.post_attention_layernorm._forward_pre_hooks


@pytest.mark.parametrize("eviction", ["lru", "hobbit", "s3-fifo"])
def test_a_recorded_run_is_what_a_replay_of_it_counts(
    tiny_bundle: TinyBundle, tmp_path: Path, eviction: str
) -> None:
    options = run_options(
        memory="60%",
        prefetch="partial:alpha=0.1",
        eviction=eviction,
        context=64,
        record_trace=True,
    )
    with open_session(tiny_bundle("mixtral"), options) as session:
        generate_ids(session, PROMPTS[:1], GenerateOptions(max_tokens=20, ignore_eos=True))
        write_trace(session, tmp_path / "run.h5", decode_seconds=1.0)
    header, calls = read_run_trace(tmp_path / "run.h5")
    counts = replay_run(header, calls)
    assert header.prefetch == "partial:alpha=0.1"
    assert int(counts.hits[calls.is_decode].sum()) == header.hits
    assert int(counts.prefetches[calls.is_decode].sum()) == header.prefetches > 0
    assert int(counts.prefetch_hits[calls.is_decode].sum()) == header.prefetch_hits > 0
    report = compare_run(header, calls, shipped_profile("laptop-16gb"), [parse_eviction("fifo")])
    assert report.is_equal  # and what others would have foretold is not known
    assert [row.eviction for row in report.policies] == ["belady, without prefetch"]


def test_a_trace_has_predictions_of_one_kind(tiny_bundle: TinyBundle) -> None:
    options = run_options(prefetch="partial", eviction="expertflow", context=64, record_trace=True)
    with pytest.raises(UsageError, match="predictions of one kind"):
        open_session(tiny_bundle("mixtral"), options)
