"""Lossy policies in a session: reproducible, inert with everything resident, else active."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_tool.artifacts.buddy_map import Buddy, BuddyMap, LayerBuddies
from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.errors import UsageError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.json_artifact import write_json_artifact
from moe_tool.models.locate import LocatedModel
from moe_tool.profiling.recorder import record_profile
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import generate_ids
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import Session, open_session
from moe_tool.text.sources import parse_sources
from tests.formats.made_mask_router import put_mask_router
from tests.packed import pack_bundle
from tests.policies.settings import ACT_ON_HITS, FIRES, INERT, LOSSY

PROMPT = [256, 84, 104, 101, 32, 108, 105, 115, 116]
GREEDY = GenerateOptions(max_tokens=24, ignore_eos=True)
ARCHITECTURES = ("qwen3_moe", "mixtral", "gpt_oss")
ANSWERS_MISSES = [name for name in LOSSY if name not in ACT_ON_HITS]


def _buddy_map(manifest: BundleManifest) -> BuddyMap:
    """Every expert's buddies are the next two; the entropy gate is always open."""
    shape = manifest.shape

    def buddy(expert: int) -> Buddy:
        return Buddy(
            expert=expert % shape.experts, similarity=0.5, scale=0.9, price=0.7, price_held_out=0.8
        )

    layers = tuple(
        LayerBuddies(
            layer=layer,
            entropy_threshold=0.0,
            buddies=tuple((buddy(e + 1), buddy(e + 2)) for e in range(shape.experts)),
            clusters=tuple(range(shape.experts)),
        )
        for layer in shape.layers
    )
    return BuddyMap(
        tool_version="0",
        identity=manifest.identity,
        profile_sha256="0" * 64,
        by="output",
        k=2,
        layers=layers,
    )


@pytest.fixture(scope="module")
def bundles(
    tiny_checkpoint: Callable[..., Path],
    tiny_bundle: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Bundles with stand-ins, replicas and prices, by architecture."""
    made = {}
    for arch in ARCHITECTURES:
        folder = tmp_path_factory.mktemp(arch)
        model = LocatedModel(folder=tiny_checkpoint(arch), name=arch)
        manifest = BundleReader.open(tiny_bundle(arch)).manifest
        write_json_artifact(folder / "tiny.buddies.json", _buddy_map(manifest))
        record_profile(
            model,
            parse_sources(["builtin"]),
            out=folder / "tiny.h5",
            tokens=512,
            seq_len=32,
            memory_bytes=8 * 2**30,
        )
        pack_bundle(
            model,
            out=folder / "bundle",
            profile=folder / "tiny.h5",
            buddies=folder / "tiny.buddies.json",
            replicas="2,rank4",
        )
        put_mask_router(folder / "bundle")
        made[arch] = folder / "bundle"
    return made


@pytest.fixture
def bundle(bundles: dict[str, Path]) -> Path:
    return bundles["qwen3_moe"]


def _open(bundle: Path, policy: str, memory: str, **options: object) -> Session:
    return open_session(
        bundle,
        run_options(memory=memory, policy=policy, context=64, **options),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("policy", LOSSY)
def test_the_same_run_twice_gives_the_same_tokens(policy: str, bundle: Path) -> None:
    made, accounts = [], []
    for threads in (1, 2):
        spec = FIRES[policy]
        with _open(bundle, spec, "50%", seed=3, gates=False, threads=threads) as session:
            made.append(generate_ids(session, [PROMPT], GREEDY).token_ids)
            made.append(generate_ids(session, [PROMPT], GREEDY).token_ids)  # a warm cache
            stats = session.runner.stats
            counters = stats.decode
            assert counters.substitutions + counters.drops + counters.replica_answers > 0
            prompt = stats.prompt
            assert prompt.substitutions + prompt.drops + prompt.replica_answers == 0
            assert stats.decode.misses > 0
            answered = (counters.substitutions, counters.drops, counters.replica_answers)
            accounts.append((answered, counters.hits, round(session.runner.account.spent, 6)))
    assert accounts[0] == accounts[1]
    assert made[0] == made[1] == made[2] == made[3]


@torch.inference_mode()
def _logits(session: Session) -> torch.Tensor:
    output = session.model(input_ids=torch.tensor([PROMPT]), use_cache=True)
    logits = []
    for token in range(70, 80):
        output = session.model(
            input_ids=torch.tensor([[token]]), past_key_values=output.past_key_values
        )
        logits.append(output.logits[0])
    return torch.cat(logits)


@pytest.mark.parametrize("policy", ANSWERS_MISSES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_with_everything_resident_it_is_exact_bit_for_bit(
    policy: str, arch: str, bundles: dict[str, Path]
) -> None:
    with _open(bundles[arch], "exact", "min") as session:
        exact = _logits(session)
    with _open(bundles[arch], policy, "100%", gates=False) as session:
        assert torch.equal(_logits(session), exact)
        assert session.runner.stats.decode.hit_rate == 1.0


@pytest.mark.parametrize("policy", LOSSY)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_at_zero_strength_it_is_inert_and_at_strength_it_fires(
    policy: str, arch: str, bundles: dict[str, Path]
) -> None:
    with _open(bundles[arch], "exact", "min") as session:
        exact = _logits(session)
    inert = INERT[policy]
    with _open(bundles[arch], inert, "50%") as session:
        assert torch.equal(_logits(session), exact)
        stats = session.runner.stats.decode
        assert stats.misses > 0
        assert stats.substitutions == stats.drops == stats.replica_answers == 0
    with _open(bundles[arch], FIRES[policy], "50%", gates=False) as session:
        assert not torch.equal(_logits(session), exact)
        stats = session.runner.stats.decode
        assert stats.substitutions + stats.drops + stats.replica_answers > 0


def test_sequences_of_a_batch_are_answered_as_if_alone(bundle: Path) -> None:
    prompts = [PROMPT, [256] + [66] * 8, [256] + [90, 80] * 4]
    with _open(bundle, "buddy", "80%", batch=3) as session:
        together = generate_ids(session, prompts, GREEDY).token_ids
        alone = [generate_ids(session, [prompt], GREEDY).token_ids[0] for prompt in prompts]
    assert list(together) == alone


def test_under_cache_residency_lossy_policies_see_what_is_cached(bundle: Path) -> None:
    with _open(bundle, "buddy", "50%", residency="cache") as session:
        generate_ids(session, [PROMPT], GREEDY)
        assert session.runner.store.pinned_mask(session.manifest.shape.layers[0]).sum() == 0
        assert session.runner.stats.decode.hits > 0


def test_a_bundle_without_buddies_refuses_the_policies_that_need_them(
    tiny_bundle: Callable[..., Path],
) -> None:
    plain = tiny_bundle("mixtral")
    for policy in ("buddy", "drop"):
        with pytest.raises(UsageError, match="buddies"):
            _open(plain, policy, "50%")
    with _open(plain, "drop", "50%", gates=False) as session:
        generate_ids(session, [PROMPT], GREEDY)
        assert session.runner.stats.decode.drops > 0


def test_an_unknown_policy_is_a_usage_error(tiny_bundle: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="use one of exact"):
        _open(tiny_bundle("mixtral"), "belady", "50%")
