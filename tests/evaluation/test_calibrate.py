"""Calibrate on a tiny model: what it writes keeps the limit, and a run follows it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_tool.budget.request import parse_memory
from moe_tool.errors import UsageError
from moe_tool.evaluation.calibrate import CalibrateOptions, CalibrationReport, calibrate
from moe_tool.evaluation.evaluate import EvaluateOptions, evaluate
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.inspection.describe_artifact import describe_artifact
from moe_tool.models.locate import LocatedModel
from moe_tool.profiling.recorder import record_profile
from moe_tool.progress import SILENT
from moe_tool.runtime.generation import GenerateOptions, generate_ids
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from moe_tool.text.sources import TextSource, parse_sources
from tests.packed import pack_bundle

PROMPT = [256, 84, 104, 101, 32, 108, 105, 115, 116]


@pytest.fixture(scope="module")
def sources() -> tuple[TextSource, ...]:
    return parse_sources(["builtin"])


@pytest.fixture(scope="module")
def packed(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated")
    model = LocatedModel(folder=tiny_checkpoint("mixtral"), name="tiny")
    record_profile(model, parse_sources(["builtin"]), out=folder / "p.h5", tokens=512, seq_len=32)
    pack_bundle(model, out=folder / "b", profile=folder / "p.h5", replicas="4,1")
    return folder / "b"


@pytest.fixture(scope="module")
def worst(packed: Path, sources: tuple[TextSource, ...]) -> float:
    """KL of the strongest setting."""
    options = EvaluateOptions(tokens=512, seq_len=32, memory=parse_memory("40%"), policy="priced")
    return evaluate(packed, sources, options).figures.kl_mean.value


def _calibrate(
    packed: Path, sources: tuple[TextSource, ...], max_kl: float, policy: str = "priced"
) -> CalibrationReport:
    return calibrate(
        packed,
        sources,
        CalibrateOptions(
            max_kl=max_kl, policy=policy, tokens=512, seq_len=32, memory=parse_memory("40%")
        ),
    )


def test_a_limit_between_nothing_and_the_worst_is_kept_and_nearly_used(
    packed: Path, sources: tuple[TextSource, ...], worst: float
) -> None:
    before = BundleReader.open(packed).manifest
    report = _calibrate(packed, sources, worst / 3)
    found = report.calibration
    assert found.quality.kl_ci95[1] <= worst / 3
    assert found.quality.kl > worst / 30
    assert found.policy.startswith("priced:nats-per-mb=")
    assert set(found.domains) == {"docs", "code", "stories"} or found.domains
    after = BundleReader.open(packed).manifest
    assert after.calibration == found
    assert after.model_copy(update={"calibration": before.calibration}) == before
    # the expected loss is in measured nats where it was calibrated
    options = EvaluateOptions(
        tokens=512, seq_len=32, memory=parse_memory("40%"), exact_fallback=True
    )
    again = evaluate(packed, sources, options)
    assert again.setup.policy == found.policy
    assert again.figures.kl_mean.value <= worst / 3 * 1.1
    assert again.figures.expected_kl == pytest.approx(found.quality.kl, rel=0.5)


def test_a_limit_that_nothing_reaches_takes_the_strongest(
    packed: Path, sources: tuple[TextSource, ...], worst: float
) -> None:
    assert _calibrate(packed, sources, 50 * worst).calibration.policy == "priced"


def test_a_run_follows_it_says_so_and_exact_overrides(
    packed: Path, sources: tuple[TextSource, ...], worst: float
) -> None:
    _calibrate(packed, sources, worst / 3)
    with open_session(packed, run_options(memory="40%", context=64)) as session:
        assert session.runner.policy.policy.lossy and session.runner.residency == "frozen"
        assert session.runner.account.limit == worst / 3
        generate_ids(session, [PROMPT], GenerateOptions(max_tokens=12, ignore_eos=True))
        assert session.runner.account.tokens == 11
        assert session.runner.account.spent > 0
    with open_session(packed, run_options(memory="40%", policy="exact", context=64)) as session:
        assert not session.runner.policy.policy.lossy
        assert session.runner.account.limit is None


def test_text_above_the_limit_makes_it_retreat(packed: Path) -> None:
    with open_session(packed, run_options(memory="40%", policy="priced", context=64)) as session:
        session.runner.account.limit = 1e-9
        generate_ids(session, [PROMPT], GenerateOptions(max_tokens=12, ignore_eos=True))
        account, stats = session.runner.account, session.runner.stats.decode
        assert account.exact_tokens == 10  # all but the first, which nothing is known of yet
        assert stats.bytes_read > 0


def test_a_policy_without_a_strength_and_a_senseless_limit_are_refused(
    packed: Path, sources: tuple[TextSource, ...]
) -> None:
    with pytest.raises(UsageError, match="no strength"):
        _calibrate(packed, sources, 0.1, policy="drop")
    for limit in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="max-kl"):
            _calibrate(packed, sources, limit)


@pytest.mark.parametrize("policy", ["near-tie", "prune", "replica"])
def test_the_other_policies_with_a_strength(
    policy: str, packed: Path, sources: tuple[TextSource, ...], worst: float
) -> None:
    found = _calibrate(packed, sources, max(worst, 0.01), policy=policy).calibration
    assert found.policy.startswith(policy) and found.quality.kl_ci95[1] <= max(worst, 0.01)


def test_a_shadowed_step_of_an_exact_policy_loses_nothing_and_changes_nothing(
    packed: Path,
) -> None:
    made = {}
    for shadow in (0, 3):
        options = run_options(memory="40%", policy="priced", context=64, shadow=shadow)
        with open_session(packed, options) as session:
            made[shadow] = generate_ids(
                session, [PROMPT], GenerateOptions(max_tokens=20, ignore_eos=True)
            ).token_ids
            if shadow:
                assert session.shadow is not None
                assert session.shadow.tokens == 6
                loss = session.shadow.nats_per_token
                assert loss is not None and loss > 0
    assert made[0] == made[3]
    options = run_options(memory="40%", policy="priced:nats-per-mb=1e-30", context=64, shadow=2)
    with open_session(packed, options) as session:
        generate_ids(session, [PROMPT], GenerateOptions(max_tokens=9, ignore_eos=True))
        assert session.shadow is not None and session.shadow.tokens == 4
        assert session.shadow.divergence == 0.0


def test_a_looser_limit_reads_no_more_and_each_is_kept(
    packed: Path, sources: tuple[TextSource, ...], worst: float
) -> None:
    reports = [_calibrate(packed, sources, worst * share) for share in (0.05, 0.2, 0.6)]
    assert all(
        report.calibration.quality.kl_ci95[1] <= worst * share
        for report, share in zip(reports, (0.05, 0.2, 0.6), strict=True)
    )
    read = [report.bytes_read_per_token for report in reports]
    assert read == sorted(read, reverse=True) and read[0] > read[-1]


def test_a_limit_out_of_reach_says_what_is_in_reach_and_what_would_do(
    packed: Path, sources: tuple[TextSource, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_tool.evaluation.calibrate._ROUNDS", 1)
    before = BundleReader.open(packed).manifest
    with pytest.raises(UsageError, match="the best that was tried, priced") as refused:
        _calibrate(packed, sources, 1e-9)
    assert "--max-kl" in str(refused.value.hint)
    assert BundleReader.open(packed).manifest == before  # nothing is written


def test_inspect_says_what_was_measured_and_on_what(
    packed: Path, sources: tuple[TextSource, ...], worst: float
) -> None:
    found = _calibrate(packed, sources, worst / 2).calibration
    facts = describe_artifact(packed, verify=False, progress=SILENT).facts
    assert facts["policy"] == found.policy
    assert f"KL {worst / 2:g}" in str(facts["calibrated_to"])
    assert f"{found.quality.kl:.4f}" in str(facts["measured"])
    assert all(f"measured_{domain}" in facts for domain in found.domains)
