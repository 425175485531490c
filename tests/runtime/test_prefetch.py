"""Reading ahead while decoding: not a bit of the output changes, and every count is a replay's."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_tool.errors import UsageError
from moe_tool.models.skeleton import LayerCall
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import generate_ids
from moe_tool.runtime.run_options import RunOptions, run_options
from moe_tool.runtime.session import Session, open_session
from tests.tiny_models import TINY

PROMPTS = ([256, 84, 104, 101, 32, 108, 105], [256, 10, 20])
TinyBundle = Callable[..., Path]
Key = tuple[int, int]


@torch.inference_mode()
def _decode(session: Session) -> torch.Tensor:
    """Logits of single tokens of two sequences after a prompt, [2, 12, V]."""
    cache, rows = session.new_cache(), []
    session.model(input_ids=torch.tensor([PROMPTS[0]] * 2), past_key_values=cache)
    for token in range(70, 82):
        ids = torch.tensor([[token], [token + 50]])
        rows.append(session.model(input_ids=ids, past_key_values=cache).logits)
    return torch.cat(rows, dim=1)


def _options(memory: str, prefetch: str) -> RunOptions:
    return run_options(memory=memory, prefetch=prefetch, context=64, prompt_tokens=32, batch=2)


@pytest.mark.parametrize("arch", TINY)
def test_no_bit_of_the_logits_changes(arch: str, tiny_bundle: TinyBundle) -> None:
    bundle = tiny_bundle(arch)
    with open_session(bundle, _options("100%", "none")) as session:
        expected = _decode(session)
        assert session.runner.stats.decode.prefetches == 0
    with open_session(bundle, _options("40%", "next-layer")) as session:
        assert torch.equal(_decode(session), expected)
        decode, prompt = session.runner.stats.decode, session.runner.stats.prompt
        assert decode.prefetches >= decode.prefetch_hits > 0
        assert prompt.prefetches == 0


@pytest.mark.parametrize("bits", ["native", "4"])
@pytest.mark.parametrize("prefetch", ["next-layer", "stacked:depth=2", "stacked:depth=8"])
@pytest.mark.parametrize("memory", ["min", "20%", "70%", "100%"])
def test_no_budget_makes_a_difference(
    memory: str, prefetch: str, bits: str, tiny_bundle: TinyBundle
) -> None:
    bundle = tiny_bundle("qwen3_moe", bits=bits, dtype="bfloat16")
    with open_session(bundle, _options(memory, "none")) as session:
        expected = _decode(session)
    with open_session(bundle, _options(memory, prefetch)) as session:
        assert torch.equal(_decode(session), expected)


def test_a_call_that_needs_every_slot_prefetches_nothing(tiny_bundle: TinyBundle) -> None:
    with open_session(tiny_bundle("mixtral"), _options("min", "next-layer")) as session:
        assert session.plan.memory.n_slots == 3

        def four_experts(call: LayerCall) -> torch.Tensor:
            index = torch.tensor([[0, 1], [2, 3]])
            call = LayerCall(
                layer=call.layer,
                module=call.module,
                hidden=call.hidden,
                index=index if len(call.index) == 2 else call.index,
                weight=call.weight,
                router_logits=call.router_logits,
            )
            return session.runner(call)

        session.skeleton.set_experts_function(four_experts)
        assert _decode(session).isfinite().all()
        assert session.runner.stats.decode.prefetches == 0


class _Replay:
    """A cache of the least recently used, told what to expect, as slowly as can be."""

    def __init__(self, n_slots: int) -> None:
        self.n_slots, self.cache = n_slots, OrderedDict[Key, None]()
        self.expected: list[Key] = []
        self.hits = self.misses = self.prefetches = self.prefetch_hits = 0

    def call(self, wanted: list[Key]) -> None:
        for key in self.expected:
            self.prefetch_hits += key in wanted
            if key not in wanted:
                del self.cache[key]
        self.expected = []
        misses = [key for key in wanted if key not in self.cache]
        for key in wanted:
            if key in self.cache:
                self.cache.move_to_end(key)
        for key in misses:
            if len(self.cache) == self.n_slots:
                self.cache.popitem(last=False)
            self.cache[key] = None
        self.hits += len(wanted) - len(misses)
        self.misses += len(misses)

    def expect(self, wanted: list[Key], ranked: list[Key]) -> None:
        for key in [key for key in ranked if key not in self.cache]:
            if len(self.cache) == self.n_slots:
                free = [held for held in self.cache if held not in wanted and held not in ranked]
                if not free:
                    return
                del self.cache[free[0]]
            self.cache[key] = None
            self.expected.append(key)
            self.prefetches += 1


def _ranked_by_hand(router: torch.nn.Module, layer: int, hidden: torch.Tensor) -> list[Key]:
    """Mixtral's rule for one token: the two largest logits, the larger one first."""
    logits = (hidden @ router.weight.T)[0].tolist()  # type: ignore[operator]
    best = sorted(range(len(logits)), key=lambda expert: -logits[expert])[:2]
    return [(layer, expert) for expert in best]


@pytest.mark.parametrize("memory", ["min", "40%", "70%"])
def test_counts_equal_those_of_a_naive_replay(memory: str, tiny_bundle: TinyBundle) -> None:
    options = run_options(memory=memory, prefetch="next-layer", context=64)
    with open_session(tiny_bundle("mixtral"), options) as session:
        replay, record_bytes = (
            _Replay(session.plan.memory.n_slots),
            session.manifest.primaries[0].record_size_bytes,
        )
        routers = {modules.layer: modules.router for modules in session.skeleton.layers}

        def replay_and_run(call: LayerCall) -> torch.Tensor:
            wanted = [(call.layer, expert) for expert in torch.unique(call.index).tolist()]
            replay.call(wanted)
            if session.runner.forward.phase == "decode" and call.layer + 1 in routers:
                after = call.layer + 1
                replay.expect(wanted, _ranked_by_hand(routers[after], after, call.hidden))
            return session.runner(call)

        session.skeleton.set_experts_function(replay_and_run)
        generate_ids(session, PROMPTS[:1], GenerateOptions(max_tokens=20, ignore_eos=True))
        prompt, decode = session.runner.stats.prompt, session.runner.stats.decode
    assert prompt.hits + decode.hits == replay.hits
    assert prompt.misses + decode.misses == replay.misses
    assert decode.prefetches == replay.prefetches > 0
    assert decode.prefetch_hits == replay.prefetch_hits > 0
    assert decode.bytes_read - decode.prefetched_bytes == decode.misses * record_bytes
    assert decode.prefetched_bytes >= decode.prefetch_hits * record_bytes


def test_frozen_experts_leave_nothing_to_read_ahead(tiny_bundle: TinyBundle) -> None:
    options = run_options(policy="drop", gates=False, prefetch="next-layer", context=64)
    with pytest.raises(UsageError, match="--prefetch next-layer: .* frozen"):
        open_session(tiny_bundle("mixtral"), options)


def test_an_unknown_name_is_refused_with_those_that_are_known(tiny_bundle: TinyBundle) -> None:
    with pytest.raises(UsageError, match="--prefetch clairvoyant") as error:
        open_session(tiny_bundle("mixtral"), run_options(prefetch="clairvoyant"))
    assert "none, next-layer" in str(error.value.hint)


def test_a_lossy_policy_over_a_cache_may_read_ahead(tiny_bundle: TinyBundle) -> None:
    options = run_options(
        policy="drop", gates=False, residency="cache", memory="40%", prefetch="next-layer"
    )
    with open_session(tiny_bundle("mixtral"), options) as session:
        generate_ids(session, PROMPTS[:1], GenerateOptions(max_tokens=12, ignore_eos=True))
        decode = session.runner.stats.decode
    assert decode.prefetches > 0 and decode.prefetch_hits > 0
    assert decode.bytes_read >= decode.prefetched_bytes > 0
