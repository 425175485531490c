"""Sessions that leave channels out: what stays the same, what gets worse, what is read."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_tool.budget.request import parse_memory
from moe_tool.errors import UsageError
from moe_tool.evaluation.evaluate import EvaluateOptions, evaluate
from moe_tool.experts.channel_forward import channel_sizes, choose_channels, selector_values
from moe_tool.models.locate import LocatedModel
from moe_tool.policies.misses import parse_miss_policy
from moe_tool.profiling.recorder import record_profile
from moe_tool.runtime import moe_layer
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import generate_ids
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import Session, open_session
from moe_tool.text.sources import parse_sources
from tests.packed import pack_bundle

PROMPT = [256, *b"The list of the things"]


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = LocatedModel(folder=tiny_checkpoint("mixtral"), name="tiny")
    folder = tmp_path_factory.mktemp("sparse")
    sources = parse_sources(["builtin"])
    record_profile(model, sources, out=folder / "p.h5", tokens=1024, seq_len=32)
    pack_bundle(model, out=folder / "b", sparse_experts="gate3:8", profile=folder / "p.h5")
    return folder / "b"


@torch.inference_mode()
def logits(session: Session, n_tokens: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the prompt, [S, V], and of tokens that are then fed one by one, [n, V]."""
    cache = session.new_cache()
    session.prompt_tokens = len(PROMPT)
    first = session.model(input_ids=torch.tensor([PROMPT]), past_key_values=cache).logits[0]
    found = []
    for token in range(n_tokens):
        ids = torch.tensor([[97 + token]])
        found.append(session.model(input_ids=ids, past_key_values=cache).logits[0, -1])
    session.prompt_tokens = None
    return first, torch.stack(found)


def open_sparse(bundle: Path, sparsity: float | None, memory: str = "40%") -> Session:
    return open_session(
        bundle,
        run_options(memory=memory, sparse_experts=sparsity, context=64, threads=1),
    )


def test_nothing_left_out_is_the_whole_bundle_bit_for_bit(bundle: Path) -> None:
    with open_sparse(bundle, None, memory="100%") as session:
        prompt, wanted = logits(session)
    for sparsity in (None, 0.0):
        with open_sparse(bundle, sparsity) as session:
            found_prompt, found = logits(session)
            assert torch.equal(found, wanted) and torch.equal(found_prompt, prompt)
            assert session.runner.stats.decode.sparsity == 0


def test_prompts_are_whole_and_memory_changes_nothing(bundle: Path) -> None:
    with open_sparse(bundle, None) as session:
        prompt, exact = logits(session)
    seen = []
    for memory in ("min", "40%", "100%"):
        with open_sparse(bundle, 0.7, memory) as session:
            found_prompt, found = logits(session)
            assert torch.equal(found_prompt, prompt)
            assert session.runner.stats.prompt.sparsity == 0
            assert 0.6 < session.runner.stats.decode.sparsity < 0.8
            seen.append(found)
    assert all(torch.equal(found, seen[0]) for found in seen)
    assert not torch.equal(seen[0], exact)


def test_fewer_channels_are_farther_off_and_fewer_bytes(bundle: Path) -> None:
    text = parse_sources(["builtin:eval"])
    options = EvaluateOptions(tokens=128, seq_len=32, memory=parse_memory("40%"), threads=1)
    divergences, read = [], []
    for sparsity in (0.0, 0.5, 0.8, 0.95):
        report = evaluate(bundle, text, replace(options, sparse_experts=sparsity))
        divergences.append(report.figures.kl_mean.value)
        read.append(report.figures.bytes_read_per_token.value)
        assert report.sparsity == pytest.approx(sparsity, abs=0.06)
        assert report.figures.bytes_read_per_token.value <= report.whole_bytes_per_token
        assert report.rows[0].policy == f"exact, sparse {sparsity:g}"
    assert divergences == sorted(divergences) and divergences[0] < 1e-6 < divergences[1]
    assert read == sorted(read, reverse=True) and read[-1] < 0.5 * read[0]


def test_masks_are_those_of_the_layers_own_input(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = 0

    def choose(module, selector, hidden, sparsity):  # type: ignore[no-untyped-def]
        nonlocal seen
        chosen = choose_channels(module, selector, hidden, sparsity)
        sizes = channel_sizes(module, selector, selector_values(module, selector, hidden))[0]
        wanted = [c for c, size in enumerate(sizes) if size >= selector.threshold(sparsity)]
        assert chosen.index.tolist() == wanted
        seen += 1
        return chosen

    monkeypatch.setattr(moe_layer, "choose_channels", choose)
    with open_sparse(bundle, 0.6) as session:
        logits(session)
        assert seen == session.runner.stats.decode.hits + session.runner.stats.decode.misses


def test_a_missed_channel_costs_accuracy_and_nothing_else(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A predictor that is wrong about everything: no channel at all is chosen."""

    def nothing(module, selector, hidden, sparsity):  # type: ignore[no-untyped-def]
        found = choose_channels(module, selector, hidden, sparsity)
        none = slice(0, 0)
        return replace(found, index=found.index[none], values=found.values[:, none])

    with open_sparse(bundle, 0.5) as session:
        _, wanted = logits(session)
    monkeypatch.setattr(moe_layer, "choose_channels", nothing)
    with open_sparse(bundle, 0.5) as session:
        _, found = logits(session)
        assert torch.isfinite(found).all() and not torch.equal(found, wanted)
        assert session.runner.stats.decode.bytes_read == 0
        assert session.runner.stats.decode.sparsity == 1


def test_torch_computes_the_same(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_sparse(bundle, 0.5) as session:
        _, native = logits(session)
    monkeypatch.setattr(
        "moe_tool.experts.channel_forward.computes_channels", lambda n_tokens: False
    )
    with open_sparse(bundle, 0.5) as session:
        _, found = logits(session)
    assert torch.allclose(native, found, rtol=1e-3, atol=1e-3)


def test_policies_of_the_others_still_run_on_whole_channels(bundle: Path) -> None:
    options = run_options(memory="40%", gates=False, context=64, threads=1)
    with open_session(bundle, options) as session:
        for policy in ("drop", "next-ranked"):
            session.use_policy(parse_miss_policy(policy), residency="frozen")
            _, found = logits(session)
            assert torch.isfinite(found).all()


def test_text_and_account_of_a_run(bundle: Path) -> None:
    with open_sparse(bundle, 0.8) as session:
        options = GenerateOptions(max_tokens=12, ignore_eos=True)
        made = generate_ids(session, [PROMPT], options)
        assert len(made.token_ids[0]) == 12
        decode = session.runner.stats.decode
        assert decode.misses and 0 < decode.bytes_read < decode.whole_bytes
        assert decode.whole_bytes == decode.misses * session.manifest.primaries[0].record_size_bytes


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sparse_experts": 1.0}, "0 to 0.95"),
        ({"sparse_experts": -0.1}, "0 to 0.95"),
        ({"sparse_experts": float("nan")}, "0 to 0.95"),
        ({"policy": "drop"}, "cannot be combined"),
        ({"batch": 2}, "one sequence at a time"),
        ({"prefetch": "next-layer"}, "read ahead"),
        ({"record_trace": True}, "a trace does not"),
    ],
)
def test_what_does_not_go_together_is_refused(
    options: dict[str, object], says: str, bundle: Path
) -> None:
    with pytest.raises(UsageError, match=says):
        open_session(bundle, run_options(**{"sparse_experts": 0.5, **options}))  # type: ignore[arg-type]


def test_another_bundle_has_no_channels(tiny_bundle: Callable[..., Path], bundle: Path) -> None:
    with pytest.raises(UsageError, match="not in channels"):
        open_session(tiny_bundle("mixtral", bits="4"), run_options(sparse_experts=0.5))
    with open_sparse(bundle, 0.5) as session, pytest.raises(UsageError, match="cannot be combined"):
        session.use_policy(parse_miss_policy("drop"), residency="frozen")
