"""Prompts are exact whatever the policy, unless a lossy prefill is asked for."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_tool.models.locate import LocatedModel
from moe_tool.policies.misses import MISS_POLICIES
from moe_tool.policies.misses.needs import BUDDIES
from moe_tool.profiling.recorder import record_profile
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import generate
from moe_tool.runtime.moe_layer import Decision
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import Session, open_session
from moe_tool.text.sources import parse_sources
from tests.formats.made_mask_router import put_mask_router
from tests.packed import pack_bundle
from tests.policies.settings import FIRES

PROMPT = torch.tensor([[256, 84, 104, 101, 32, 108, 105, 115, 116, 100, 101, 102]])
POLICIES = [
    policy
    for name, policy in FIRES.items()
    if BUDDIES not in MISS_POLICIES[name].needs  # the bundle has no stand-ins
]


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lossy-prefill")
    model = LocatedModel(folder=tiny_checkpoint("mixtral"), name="mixtral")
    record_profile(
        model,
        parse_sources(["builtin"]),
        out=folder / "tiny.h5",
        tokens=512,
        seq_len=32,
        memory_bytes=8 * 2**30,
    )
    pack_bundle(model, out=folder / "bundle", profile=folder / "tiny.h5", replicas="2")
    put_mask_router(folder / "bundle")
    return folder / "bundle"


def _open(bundle: Path, policy: str, memory: str = "50%", **options: object) -> Session:
    return open_session(
        bundle,
        run_options(memory=memory, policy=policy, context=64, gates=False, **options),  # type: ignore[arg-type]
    )


@torch.inference_mode()
def _prompt_logits(session: Session) -> torch.Tensor:
    logits: torch.Tensor = session.model(input_ids=PROMPT, use_cache=True).logits
    return logits


def _n_changed(session: Session) -> int:
    counters = session.runner.stats.prompt
    return counters.substitutions + counters.replica_answers + counters.drops


@pytest.mark.parametrize("policy", POLICIES)
def test_a_prompt_is_exact_and_with_the_flag_it_is_not(policy: str, bundle: Path) -> None:
    with _open(bundle, "exact") as session:
        exact = _prompt_logits(session)
    with _open(bundle, policy) as session:
        assert torch.equal(_prompt_logits(session), exact)
        assert _n_changed(session) == 0 and session.runner.account.prompt_spent == 0
    with _open(bundle, policy, lossy_prompt=True) as session:
        assert not torch.equal(_prompt_logits(session), exact)
        assert _n_changed(session) > 0
        assert session.runner.account.prompt_spent > 0
        assert session.runner.account.spent == 0  # of decode
        assert session.runner.stats.prompt.tokens == PROMPT.shape[1]


def test_the_flag_changes_nothing_under_exact_and_says_so(bundle: Path) -> None:
    notes: list[str] = []

    class Listening:
        def begin(self, *_: object) -> None: ...
        def advance(self, *_: object) -> None: ...
        def end(self) -> None: ...
        def note(self, text: str) -> None:
            notes.append(text)

    with _open(bundle, "exact") as session:
        exact = _prompt_logits(session)
    for policy in ("exact", "priced:kl=inf"):
        options = run_options(memory="50%", policy=policy, context=64, lossy_prompt=True)
        with open_session(bundle, options, progress=Listening()) as session:  # type: ignore[arg-type]
            is_exact = torch.equal(_prompt_logits(session), exact)
        assert is_exact is (policy == "exact")
    told = [note for note in notes if note.startswith("lossy prefill")]
    assert "changes nothing" in told[0] and "stays" in told[1]


def test_pruning_spares_what_the_prompt_attends_to(bundle: Path) -> None:
    """At protect=1 nobody is pruned; at 0.25 the quarter that matters most keeps its experts."""
    with _open(bundle, "exact") as session:
        exact = _prompt_logits(session)
    with _open(bundle, "prune:share=1,protect=1", lossy_prompt=True) as session:
        # attention step by step rounds otherwise
        torch.testing.assert_close(_prompt_logits(session), exact, atol=1e-4, rtol=1e-4)
        assert _n_changed(session) == 0
    seen: list[Decision] = []
    with _open(bundle, "prune:share=1,protect=0.25", lossy_prompt=True) as session:
        session.runner.on_decision = seen.append
        _prompt_logits(session)
        config = session.model.config
        with torch.inference_mode():  # decoding protects nobody
            cache = session.new_cache()
            session.model(input_ids=PROMPT, past_key_values=cache, use_cache=True)
            assert config._attn_implementation == "eager"
            session.model(input_ids=PROMPT[:, :1], past_key_values=cache, use_cache=True)
            assert config._attn_implementation == "sdpa"
    n_layers = len(session.manifest.shape.layers)
    for decision in seen[:n_layers]:
        importance = decision.routing.importance
        assert importance is not None and len(importance) == PROMPT.shape[1]
        spared = set((-importance).argsort(kind="stable")[:3].tolist())
        whole = decision.answers.present.all(axis=1).nonzero()[0]
        assert spared <= set(whole.tolist())
        assert len(whole) < PROMPT.shape[1]
    assert all(decision.routing.importance is None for decision in seen[2 * n_layers :])


def test_attention_step_by_step_is_in_the_account_of_memory(bundle: Path) -> None:
    def buffers(session: Session) -> int:
        return next(line.size_bytes for line in session.plan.memory.lines if "buffers" in line.name)

    with _open(bundle, "prune:share=1", lossy_prompt=True) as session:
        stepwise = buffers(session)
    with _open(bundle, "prune:share=1") as session:
        assert buffers(session) < stepwise
        assert session.runner.attention is None


def test_a_run_says_what_it_did_to_the_prompt(bundle: Path) -> None:
    with _open(bundle, "priced:kl=inf", lossy_prompt=True) as session:
        result = generate(session, "the list of", GenerateOptions(max_tokens=4, ignore_eos=True))
    assert result.prompt.changed_answers > 0
    assert result.quality.prompt_expected_kl is not None and result.quality.prompt_expected_kl > 0
    with _open(bundle, "priced:kl=inf") as session:
        result = generate(session, "the list of", GenerateOptions(max_tokens=4, ignore_eos=True))
    assert result.quality.prompt_expected_kl is None and result.prompt.replica_answers == 0
