"""Exact is exact: token for token that of transformers, bit for bit that of everything resident."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_tool.models.skeleton import LayerCall
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import generate_ids
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import Session, open_session
from tests.tiny_models import TINY

N_TOKENS = 32
PROMPTS = ([256, 84, 104, 101, 32, 108, 105, 115, 116], [256, 10, 20, 30], [256] + [65, 66] * 9)
TinyBundle = Callable[..., Path]


def _transformers_tokens(folder: Path, prompts: tuple[list[int], ...]) -> list[list[int]]:
    """Greedy tokens of the ordinary model, shorter prompts padded on the left."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[258] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        made = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=N_TOKENS, do_sample=False
        )
    rows = []
    for row in made[:, width:].tolist():
        rows.append(row[: row.index(257) + 1] if 257 in row else row)
    return rows


@pytest.mark.parametrize("arch", TINY)
def test_tokens_equal_those_of_transformers(
    arch: str, tiny_checkpoint: Callable[..., Path], tiny_bundle: TinyBundle
) -> None:
    options = run_options(memory="min", context=64, prompt_tokens=32, batch=3)
    with open_session(tiny_bundle(arch), options) as session:
        assert session.plan.memory.n_slots == session.manifest.shape.top_k + 1
        for prompts in (PROMPTS[:1], PROMPTS):
            made = generate_ids(session, prompts, GenerateOptions(max_tokens=N_TOKENS))
            expected = _transformers_tokens(tiny_checkpoint(arch), prompts)
            assert [list(row) for row in made.token_ids] == expected


@torch.inference_mode()
def _all_logits(session: Session) -> torch.Tensor:
    """Logits of a prompt and of single tokens after it, [n, V]."""
    prompt = torch.tensor([PROMPTS[2]])
    output = session.model(input_ids=prompt, use_cache=True)
    logits = [output.logits[0]]
    for token in range(70, 80):
        output = session.model(
            input_ids=torch.tensor([[token]]), past_key_values=output.past_key_values
        )
        logits.append(output.logits[0])
    return torch.cat(logits)


@pytest.mark.parametrize("bits", ["native", "8", "4"])
def test_the_memory_budget_changes_no_bit_of_the_logits(bits: str, tiny_bundle: TinyBundle) -> None:
    bundle = tiny_bundle("qwen3_moe", bits=bits, dtype="bfloat16")
    found = []
    for memory in ("min", "50%", "100%"):
        with open_session(bundle, run_options(memory=memory, context=64)) as session:
            found.append(_all_logits(session))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])
    assert found[0].isfinite().all()


def _replay(calls: list[tuple[int, list[int]]], n_slots: int) -> list[tuple[int, int]]:
    """Hits and misses of each call under least-recently-used, as slowly as can be."""
    cache: OrderedDict[tuple[int, int], None] = OrderedDict()
    counts = []
    for layer, experts in calls:
        named = [(layer, expert) for expert in experts]
        hits = [key for key in named if key in cache]
        for key in named:
            if key in cache:
                cache.move_to_end(key)
            elif key not in hits:
                if len(cache) == n_slots:
                    others = [held for held in cache if held not in named]
                    del cache[(others or list(cache))[0]]
                cache[key] = None
        counts.append((len(hits), len(named) - len(hits)))
    return counts


def test_hits_equal_those_of_a_naive_replay(tiny_bundle: TinyBundle) -> None:
    calls: list[tuple[str, int, list[int]]] = []
    with open_session(tiny_bundle("mixtral"), run_options(memory="40%", context=64)) as session:

        def log_and_run(call: LayerCall) -> torch.Tensor:
            calls.append(
                (session.runner.forward.phase, call.layer, torch.unique(call.index).tolist())
            )
            return session.runner(call)

        session.skeleton.set_experts_function(log_and_run)
        generate_ids(session, PROMPTS[:1], GenerateOptions(max_tokens=20, ignore_eos=True))
        stats, n_slots = session.runner.stats, session.plan.memory.n_slots
        record_bytes = session.manifest.primaries[0].record_size_bytes
    counts = _replay([(layer, experts) for _, layer, experts in calls], n_slots)
    for phase in ("prompt", "decode"):
        of_phase = [count for count, call in zip(counts, calls, strict=True) if call[0] == phase]
        counters = stats.phase(phase)
        assert counters.hits == sum(hits for hits, _ in of_phase)
        assert counters.misses == sum(misses for _, misses in of_phase)
        assert counters.bytes_read == counters.misses * record_bytes
    assert stats.decode.hits > 0 and stats.decode.misses > 0
    assert stats.prompt.forwards == 1 and stats.decode.forwards == 19
    assert stats.prompt.tokens == len(PROMPTS[0]) and stats.decode.tokens == 19
