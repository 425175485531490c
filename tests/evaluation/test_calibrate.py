"""Calibrate on a tiny model: what it writes keeps the limit, and a run follows it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_tool.artifacts.bundle_manifest import QualityFigure
from moe_tool.artifacts.evaluation_report import Figures, PolicyRow
from moe_tool.budget.request import parse_memory
from moe_tool.errors import UsageError
from moe_tool.evaluation.calibrate import CalibrationReport, calibrate
from moe_tool.evaluation.evaluate import EvaluateOptions, evaluate
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.inspection.describe_artifact import describe_artifact
from moe_tool.models.locate import LocatedModel
from moe_tool.policies.misses import PRICED_POLICY, MissChoice, parse_miss_policy
from moe_tool.profiling.recorder import record_profile
from moe_tool.progress import SILENT
from moe_tool.runtime.decoding_config import GenerateOptions
from moe_tool.runtime.generation import generate_ids
from moe_tool.runtime.run_options import run_options
from moe_tool.runtime.session import open_session
from moe_tool.text.sources import TextSource, parse_sources
from tests.packed import pack_bundle

PROMPT = [256, 84, 104, 101, 32, 108, 105, 115, 116]
TEXT = {"tokens": 128, "seq_len": 8, "memory": parse_memory("40%")}


@pytest.fixture(scope="module")
def sources() -> tuple[TextSource, ...]:
    return parse_sources(["builtin"])


@pytest.fixture(scope="module")
def packed(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    model = LocatedModel(folder=tiny_checkpoint("mixtral"), name="tiny")
    record_profile(model, parse_sources(["builtin"]), out=folder / "p.h5", tokens=512, seq_len=32)
    pack_bundle(model, out=folder / "b", profile=folder / "p.h5", replicas="4,1")
    return folder / "b"


@pytest.fixture(scope="module")
def worst(packed: Path, sources: tuple[TextSource, ...]) -> float:
    """KL of the strongest setting."""
    options = EvaluateOptions(policy=PRICED_POLICY, **TEXT)
    return evaluate(packed, sources, options).figures.kl_mean.value


@pytest.fixture(scope="module")
def calibrated(
    packed: Path,
    sources: tuple[TextSource, ...],
    worst: float,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, CalibrationReport]:
    """A bundle that was calibrated to a third of the worst, and the report."""
    folder = Path(shutil.copytree(packed, tmp_path_factory.mktemp("calibrated") / "b"))
    return folder, _calibrate(folder, sources, worst / 3)


def _calibrate(
    folder: Path, sources: tuple[TextSource, ...], max_kl: float, policy: MissChoice = PRICED_POLICY
) -> CalibrationReport:
    return calibrate(folder, sources, EvaluateOptions(policy=policy, **TEXT), max_kl=max_kl)


@pytest.mark.slow
def test_what_is_written_is_the_strongest_setting_that_keeps_the_limit_when_measured_again(
    packed: Path,
    calibrated: tuple[Path, CalibrationReport],
    sources: tuple[TextSource, ...],
    worst: float,
) -> None:
    folder, report = calibrated
    found = report.calibration
    before, after = (BundleReader.open(each).manifest for each in (packed, folder))
    assert after.calibration == found
    assert after.model_copy(update={"calibration": before.calibration}) == before
    # Every setting that was tried, and the written one, evaluated in the untouched bundle.
    tried, written = [trial.policy for trial in report.trials], parse_miss_policy(found.policy)
    names = [policy.name for policy in tried]
    options = EvaluateOptions(policy=written, also=tuple(tried), **TEXT)
    rows = {row.policy: row for row in evaluate(packed, sources, options).rows}
    upper = {name: row.figures.kl_mean.high for name, row in rows.items()}
    kept = [name for name in names if upper[name] <= worst / 3]
    strongest = max(kept, key=_strength)
    assert found.policy in (strongest, f"{strongest},reroute=2", f"{strongest},reroute=0.75")
    assert all(_bytes(rows[strongest]) <= _bytes(rows[n]) for n in kept)
    assert report.bytes_read_per_token == _bytes(rows[found.policy])
    assert upper[found.policy] <= worst / 3 < min(upper[n] for n in set(names) - set(kept))
    assert upper[found.policy] <= upper[strongest]
    _is_measured(found.quality, rows[found.policy].figures)
    domains = rows[found.policy].domains
    assert found.domains.keys() == domains.keys() == {each.domain for each in sources}
    for domain, quality in found.domains.items():
        _is_measured(quality, domains[domain])
    # Prices are exchanged for the nats that they were measured to be.
    expected = rows[found.policy].figures.expected_kl
    assert expected is not None
    assert expected * found.nats_per_price == pytest.approx(found.quality.kl)
    again = evaluate(folder, sources, EvaluateOptions(exact_fallback=True, **TEXT))
    assert again.setup.policy == found.policy
    assert again.figures.kl_mean.value <= worst / 3 * 1.1
    assert again.figures.expected_kl == pytest.approx(again.figures.kl_mean.value, rel=0.5)


def _strength(name: str) -> float:
    return parse_miss_policy(name).values["nats-per-mb"]


def _bytes(row: PolicyRow) -> float:
    return row.figures.bytes_read_per_token.value


def _is_measured(quality: QualityFigure, figures: Figures) -> None:
    assert quality.kl == pytest.approx(figures.kl_mean.value)
    assert quality.kl_ci95 == pytest.approx(figures.kl_mean.ci95)
    assert quality.tokens == figures.tokens


@pytest.mark.slow
def test_a_run_follows_it_says_so_and_exact_overrides(
    calibrated: tuple[Path, CalibrationReport], worst: float
) -> None:
    folder, _ = calibrated
    with open_session(folder, run_options(memory="40%", context=64)) as session:
        assert session.runner.policy.is_lossy and session.runner.residency == "frozen"
        assert session.runner.account.limit == worst / 3
        generate_ids(session, [PROMPT], GenerateOptions(max_tokens=12, ignore_eos=True))
        assert session.runner.account.tokens == 11
        assert session.runner.account.spent > 0
    with open_session(folder, run_options(memory="40%", policy="exact", context=64)) as session:
        assert not session.runner.policy.is_lossy
        assert session.runner.account.limit is None


def test_text_above_the_limit_makes_it_retreat(packed: Path) -> None:
    with open_session(
        packed, run_options(memory="40%", policy="priced:kl=inf", context=64)
    ) as session:
        session.runner.account.limit = 1e-9
        generate_ids(session, [PROMPT], GenerateOptions(max_tokens=12, ignore_eos=True))
        account, stats = session.runner.account, session.runner.stats.decode
        assert account.exact_tokens == 10  # all but the first, which nothing is known of yet
        assert stats.bytes_read > 0


def test_a_policy_without_a_strength_and_a_senseless_limit_are_refused(
    packed: Path, sources: tuple[TextSource, ...]
) -> None:
    with pytest.raises(UsageError, match="no strength"):
        _calibrate(packed, sources, 0.1, policy=parse_miss_policy("drop"))
    for limit in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="max-kl"):
            _calibrate(packed, sources, limit)


def test_a_measured_token_becomes_exact_and_an_exact_policy_loses_nothing(packed: Path) -> None:
    options = run_options(memory="40%", policy="priced:kl=inf", context=64, shadow=3)
    with open_session(packed, options) as session:
        generate_ids(session, [PROMPT], GenerateOptions(max_tokens=20, ignore_eos=True))
        shadow, account = session.learner.shadow, session.runner.account
        assert shadow is not None and shadow.tokens == account.judged_tokens == 6
        assert shadow.nats_per_token is not None and shadow.nats_per_token > 0
        assert account.judged_measured == pytest.approx(shadow.divergence)
        assert session.runner.live is not None and session.runner.live.n_measured == 6
    every = run_options(memory="40%", policy="priced:kl=inf", context=64, shadow=1)
    exact = run_options(memory="40%", policy="exact", context=64)
    made = []
    for options in (every, exact):
        with open_session(packed, options) as session:
            limits = GenerateOptions(max_tokens=12, ignore_eos=True)
            made.append(generate_ids(session, [PROMPT], limits).token_ids)
    assert made[0] == made[1]
    options = run_options(memory="40%", policy="priced:nats-per-mb=1e-30", context=64, shadow=2)
    with open_session(packed, options) as session:
        generate_ids(session, [PROMPT], GenerateOptions(max_tokens=9, ignore_eos=True))
        assert session.learner.shadow is not None and session.learner.shadow.tokens == 4
        assert session.learner.shadow.divergence == 0.0


def test_what_is_learned_of_a_text_does_not_depend_on_threads_or_earlier_texts(
    packed: Path,
) -> None:
    made = []
    for threads in (1, 2):
        options = run_options(
            memory="40%", policy="priced:kl=0.001", context=64, threads=threads, residency="frozen"
        )
        with open_session(packed, options) as session:
            for _ in range(2):
                limits = GenerateOptions(max_tokens=34, ignore_eos=True)
                ids = generate_ids(session, [PROMPT], limits).token_ids
                live, worth = session.runner.live, session.runner.worth
                assert live is not None and worth is not None
                factors = [live.factors(layer).tolist() for layer in session.manifest.shape.layers]
                made.append((ids, factors, worth.nats_per_mb, live.n_measured))
            assert session.runner.stats.decode.changed_answers > 0
    assert made[0] == made[1] == made[2] == made[3]


def test_by_default_losses_are_measured_where_one_is_to_be_kept(packed: Path) -> None:
    def measured(policy: str, **options: object) -> int:
        given = run_options(memory="40%", policy=policy, context=64, **options)  # type: ignore[arg-type]
        with open_session(packed, given) as session:
            limits = GenerateOptions(max_tokens=34, ignore_eos=True)
            generate_ids(session, [PROMPT], limits)
            shadow = session.learner.shadow
            return 0 if shadow is None else shadow.tokens

    assert measured("priced") == 6  # after 2, 4, 8, 12, 16 and 32 tokens
    assert measured("priced", shadow=0) == 0
    assert measured("priced:kl=inf") == 0 and measured("drop", gates=False) == 0
    assert measured("drop", gates=False, shadow=10) == 3


def test_a_limit_out_of_reach_says_what_is_in_reach_and_what_would_do(
    packed: Path, sources: tuple[TextSource, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_tool.evaluation.calibrate._ROUNDS", 1)
    before = BundleReader.open(packed).manifest
    with pytest.raises(UsageError, match="the best one, priced") as refused:
        _calibrate(packed, sources, 1e-9)
    assert "--max-kl" in str(refused.value.hint)
    assert BundleReader.open(packed).manifest == before  # nothing is written


def test_inspect_says_what_was_measured_and_on_what(
    calibrated: tuple[Path, CalibrationReport], worst: float
) -> None:
    folder, report = calibrated
    found = report.calibration
    facts = describe_artifact(folder, verify=False, progress=SILENT).facts
    assert facts["policy"] == found.policy
    assert f"KL {worst / 3:g}" in str(facts["calibrated_to"])
    assert f"{found.quality.kl:.4f}" in str(facts["measured"])
    assert [f"measured_{each}" in facts for each in ("docs", "code")] == [True, True]
