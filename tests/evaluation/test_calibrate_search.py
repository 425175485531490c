"""Calibrate's search, against divergences that are known for every strength."""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_tool.artifacts.evaluation_report import Estimate, Figures
from moe_tool.evaluation import calibrate as module
from moe_tool.evaluation.calibrate import CalibrationReport, calibrate
from moe_tool.evaluation.evaluate import EvaluateOptions
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.locate import LocatedModel
from moe_tool.policies.misses import MissChoice, parse_miss_policy
from moe_tool.profiling.recorder import record_profile
from moe_tool.runtime.price_list import price_book
from moe_tool.text.sources import TextSource, parse_sources
from tests.packed import pack_bundle

DOMAINS = {"docs": 0.5, "code": 1.5}
"""Each domain's divergence beside that of all"""


@pytest.fixture(scope="module")
def packed(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searched")
    model = LocatedModel(folder=tiny_checkpoint("mixtral"), name="tiny")
    record_profile(model, parse_sources(["builtin"]), out=folder / "p.h5", tokens=512, seq_len=32)
    pack_bundle(model, out=folder / "b", profile=folder / "p.h5", replicas="4,1")
    return folder / "b"


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """Evaluations by formula: nothing runs."""

    strength: Callable[[dict[str, float]], float]
    """From a policy's parameters, rising with what it saves"""
    kl: Callable[[float], float]
    """Strength -> the interval's upper end, rising; the mean is half of it"""
    by_reroute: dict[float, float]
    """What other values of it multiply the divergence by"""

    def figures(self, policy: MissChoice, factor: float = 1.0) -> Figures:
        values = dict(policy.values)
        strength = self.strength(values)
        upper = factor * self.kl(strength) * self.by_reroute.get(values.get("reroute", 1.0), 1.0)
        known: dict[str, Any] = dict.fromkeys((each.name for each in fields(Figures)), 0)
        known |= {
            "tokens": 100,
            "kl_mean": Estimate(value=upper / 2, ci95=(upper / 4, upper)),
            "bytes_read_per_token": Estimate(value=1000 / (1 + strength), ci95=None),
            "substitutions_per_token": 1.0,
            "expected_kl": upper / 8,
        }
        return Figures(**known)

    def evaluate(
        self, folder: Path, sources: Sequence[TextSource], options: EvaluateOptions, **_: object
    ) -> SimpleNamespace:
        assert options.policy is not None and not options.exact_fallback
        rows = [
            SimpleNamespace(
                policy=policy.name,
                figures=self.figures(policy),
                domains={name: self.figures(policy, by) for name, by in DOMAINS.items()},
            )
            for policy in (options.policy, *options.also)
        ]
        return SimpleNamespace(setup=SimpleNamespace(slots=7), rows=rows)


def _calibrate(
    packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    known: Known,
    *,
    max_kl: float,
    **options: Any,
) -> CalibrationReport:
    folder = Path(shutil.copytree(packed, tmp_path / "b"))
    monkeypatch.setattr(module, "evaluate", known.evaluate)
    settings = EvaluateOptions(**options)
    report = calibrate(folder, parse_sources(["builtin"]), settings, max_kl=max_kl)
    assert BundleReader.open(folder).manifest.calibration == report.calibration
    return report


def _by(parameter: str) -> Callable[[dict[str, float]], float]:
    return lambda values: values[parameter]


LINEAR: dict[str, Callable[[dict[str, float]], float]] = {
    "near-tie": _by("alpha"),
    "prune": _by("share"),
    "replica": lambda values: 1 - values["high"],
}


@pytest.mark.parametrize("limit", [0.9, 0.31, 0.04, 0.002])
@pytest.mark.parametrize("policy", LINEAR)
def test_it_comes_within_a_sixtieth_of_the_strongest_that_keeps_the_limit(
    policy: str, limit: float, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Known(strength=LINEAR[policy], kl=lambda s: s**2, by_reroute={})
    best, choice = math.sqrt(limit), parse_miss_policy(policy)
    report = _calibrate(packed, tmp_path, monkeypatch, known, max_kl=limit, policy=choice)
    found = known.strength(dict(parse_miss_policy(report.calibration.policy).values))
    assert found**2 <= limit
    assert found**2 >= 0.9 * limit or found > best - 1 / 60
    assert report.bytes_read_per_token == pytest.approx(1000 / (1 + found))


@pytest.mark.parametrize("by_reroute", [{}, {math.inf: 0.9, 3.0: 1.1}, {math.inf: 1.1, 3.0: 0.8}])
@pytest.mark.parametrize("share", [1.5, 0.3, 0.004])
def test_prices_are_searched_by_factors_and_what_rerouting_keeps_after_them(
    share: float,
    by_reroute: dict[float, float],
    packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    book = price_book(BundleReader.open(packed).manifest)
    assert book is not None
    typical = book.typical_nats_per_mb
    known = Known(
        strength=_by("nats-per-mb"), kl=lambda s: min(s / typical, 9.0), by_reroute=by_reroute
    )
    report = _calibrate(packed, tmp_path, monkeypatch, known, max_kl=share)
    chosen = parse_miss_policy(report.calibration.policy)
    upper = min(chosen.values["nats-per-mb"] / typical, 9.0)
    assert upper <= share and upper > share / 1.25  # rounds divide a decade by 4
    assert chosen.values["reroute"] == min([1.0, *by_reroute], key=lambda r: by_reroute.get(r, 1.0))
    # What is written is what was measured there, in each domain too.
    figures = known.figures(chosen)
    quality = report.calibration.quality
    assert (quality.kl, quality.kl_ci95) == (figures.kl_mean.value, figures.kl_mean.ci95)
    assert {name: found.kl for name, found in report.calibration.domains.items()} == {
        name: pytest.approx(figures.kl_mean.value * by) for name, by in DOMAINS.items()
    }
    assert report.calibration.nats_per_price == pytest.approx(4.0)
    assert report.calibration.expert_slots == 7


def test_a_limit_that_everything_keeps_takes_the_strongest(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Known(strength=_by("nats-per-mb"), kl=lambda s: 0.1, by_reroute={math.inf: 2, 3.0: 2})
    report = _calibrate(packed, tmp_path, monkeypatch, known, max_kl=0.1)
    assert report.calibration.policy == "priced:kl=inf"


def test_a_looser_limit_reads_less(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Known(strength=_by("share"), kl=lambda s: 2 * s, by_reroute={})
    read, choice = [], parse_miss_policy("prune")
    for limit in (0.05, 0.2, 0.6):
        folder = tmp_path / str(limit)
        folder.mkdir()
        report = _calibrate(packed, folder, monkeypatch, known, max_kl=limit, policy=choice)
        read.append(report.bytes_read_per_token)
    assert read[0] > read[1] > read[2]
