"""Search the strongest setting of a lossy policy whose measured divergence keeps a limit."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from moe_tool.artifacts.bundle_manifest import BundleManifest, Calibration
from moe_tool.artifacts.bundle_sections import QualityFigure
from moe_tool.artifacts.evaluation_report import Figures
from moe_tool.artifacts.json_fields import object_fields
from moe_tool.errors import UsageError
from moe_tool.evaluation.evaluate import EvaluateOptions, evaluate
from moe_tool.evaluation.reachable_budget import enough_tokens, least_share
from moe_tool.formats.bundle_files import MANIFEST
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.json_artifact import write_json_artifact
from moe_tool.policies.misses import MISS_POLICIES, PRICED_POLICY, MissChoice, StrengthGrid
from moe_tool.progress import SILENT, Progress
from moe_tool.runtime.policy_choice import manifest_inputs
from moe_tool.runtime.price_list import price_book
from moe_tool.text.sources import TextSource

_ROUNDS = 3
_PER_ROUND = 5
_CLOSE = 0.9
"""Share of the limit from which on a setting is not refined any more"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One measured setting."""

    policy: MissChoice
    figures: Figures
    domains: Mapping[str, Figures]
    """Figures of each domain of the text"""
    slots: int
    """Expert slots"""

    @property
    def upper(self) -> float:
        """Upper end of the KL interval, which has to keep the limit."""
        return self.figures.kl_mean.high


Measure = Callable[[Iterable[MissChoice]], list[Trial]]
"""Function that returns a trial per policy, in order"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationReport:
    """The calibrated policy, as written into the manifest, with all trials."""

    bundle: str
    calibration: Calibration
    trials: tuple[Trial, ...]
    """Settings from the strongest to the weakest"""
    bytes_read_per_token: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields of `--json`."""
        return {
            "bundle": self.bundle,
            **self.calibration.model_dump(mode="json"),
            "bytes_read_per_token": self.bytes_read_per_token,
            "trials": [{"policy": t.policy.name, **object_fields(t.figures)} for t in self.trials],
            "seconds": self.seconds,
        }


def calibrate(
    folder: Path,
    sources: Sequence[TextSource],
    options: EvaluateOptions,
    *,
    max_kl: float,
    progress: Progress = SILENT,
) -> CalibrationReport:
    """Find the strongest setting whose divergence keeps the limit, and write it into the manifest.

    Divergence is KL(exact || policy) per token, each predicted from context that the policy
    computed; the upper end of its 95 % interval has to keep the limit. Only the manifest's
    calibration changes.

    Args:
        options: settings of the measurement; parameters of the policy (default: priced) other than
            the strength stay fixed.
        max_kl: limit in nats per token.

    Raises:
        UsageError: the policy has no strength to search, no setting keeps the limit, or the bundle
            lacks what the policy needs.
        BudgetError, DataSourceError, CorruptArtifactError: as `evaluate`.
    """
    began, choice = time.perf_counter(), options.policy or PRICED_POLICY
    if not 0 < max_kl < 100:
        raise UsageError(f"--max-kl {max_kl:g}: not possible", hint="nats per token, e.g. 0.01")
    with BundleReader.open(folder) as bundle:
        manifest = bundle.manifest
    measure = partial(_measure, folder, sources, options, progress)
    trials = _search(measure, choice, _first_grid(choice, manifest), max_kl)
    kept = [strength for strength, trial in trials.items() if trial.upper <= max_kl]
    if not kept:
        raise _out_of_reach(
            manifest, min(trials.values(), key=lambda trial: trial.upper), max_kl, options.tokens
        )
    best = _best_alternative(measure, trials[max(kept)])
    calibration = Calibration(
        policy=best.policy.name,
        max_kl=max_kl,
        quality=_quality(best.figures),
        domains={name: _quality(figures) for name, figures in best.domains.items()},
        sources=tuple(f"{source.domain}={source.spec}" for source in sources),
        expert_slots=best.slots,
        nats_per_price=_exchange(best.figures),
    )
    write_json_artifact(folder / MANIFEST, manifest.model_copy(update={"calibration": calibration}))
    return CalibrationReport(
        bundle=str(folder),
        calibration=calibration,
        trials=tuple(trials[strength] for strength in sorted(trials, reverse=True)),
        bytes_read_per_token=best.figures.bytes_read_per_token.value,
        seconds=time.perf_counter() - began,
    )


def _measure(
    folder: Path,
    sources: Sequence[TextSource],
    options: EvaluateOptions,
    progress: Progress,
    policies: Iterable[MissChoice],
) -> list[Trial]:
    first, *others = policies
    asked = replace(
        options, policy=first, also=tuple(others), exact_fallback=False, residency="frozen"
    )
    report = evaluate(folder, sources, asked, progress=progress)
    rows = {row.policy: row for row in report.rows}
    found = [(policy, rows[policy.name]) for policy in (first, *others)]
    slots = report.setup.slots
    return [
        Trial(policy=policy, figures=row.figures, domains=row.domains, slots=slots)
        for policy, row in found
    ]


def _search(
    measure: Measure, choice: MissChoice, grid: StrengthGrid, max_kl: float
) -> dict[float, Trial]:
    """Return all trials by strength."""
    strength = choice.spec.strength
    assert strength is not None
    trials: dict[float, Trial] = {}
    for _ in range(_ROUNDS):
        policies = (choice.with_value(strength.parameter, grid.value(s)) for s in grid.points)
        trials.update(zip(grid.points, measure(policies), strict=True))
        finer = _refine(grid, trials, max_kl)
        if finer is None:
            break
        grid = finer
    return trials


def _best_alternative(measure: Measure, best: Trial) -> Trial:
    """Return the best of a setting and its policy's alternatives at the same strength."""
    policies = tuple(
        best.policy.with_value(parameter, value)
        for parameter, values in best.policy.spec.alternatives.items()
        for value in values
    )
    if not policies or not best.figures.substitutions_per_token:
        return best
    return min((best, *measure(policies)), key=lambda trial: trial.upper)


def _out_of_reach(
    manifest: BundleManifest, best: Trial, max_kl: float, asked_tokens: int
) -> UsageError:
    """Return the refusal: the best trial, and limits, text or memory that would suffice."""
    mean, hints = best.figures.kl_mean.value, [f"--max-kl {best.upper * 1.05:.2g}"]
    tokens = enough_tokens(best.figures.tokens, mean=mean, upper=best.upper, max_kl=max_kl)
    if tokens is not None:
        hints.append(f"--tokens {max(tokens, asked_tokens) * 5 // 4}, for a narrower interval")
    book = price_book(manifest)
    if book is not None and best.policy.spec.residents == "cheapest":
        share = least_share(manifest, book, max_kl=max_kl, nats_per_price=_exchange(best.figures))
        if share is not None:
            hints.append(f"--memory {math.ceil(100 * share)}%, by the price list")
    return UsageError(
        f"no setting of {best.policy.spec.name} keeps a KL of {max_kl:g}: the best one, "
        f"{best.policy.name}, has {mean:.4f} with an upper end of {best.upper:.4f}",
        hint=" or ".join(hints),
    )


def _first_grid(choice: MissChoice, manifest: BundleManifest) -> StrengthGrid:
    strength = choice.spec.strength
    if strength is None:
        able = [name for name, spec in MISS_POLICIES.items() if spec.strength is not None]
        raise UsageError(
            f"--policy {choice.spec.name} has no strength to search", hint=f"use {', '.join(able)}"
        )
    return strength.grid(manifest_inputs(manifest))


def _refine(
    grid: StrengthGrid, trials: Mapping[float, Trial], max_kl: float
) -> StrengthGrid | None:
    """Return points between the strongest setting that keeps the limit and the weakest that does
    not; None if the search is done."""
    kept = [s for s, trial in trials.items() if trial.upper <= max_kl]
    broken = [s for s, trial in trials.items() if trial.upper > max_kl]
    if not broken or (kept and trials[max(kept)].upper >= _CLOSE * max_kl):
        return None
    high = min(broken)
    low = max((s for s in kept if s < high), default=high / 1000)
    points = [grid.middle(low, high)]
    points += [grid.middle(low, points[0]), grid.middle(points[0], high)]
    if not kept:
        points = [high / 3, high / 10, high / 30, high / 100, high / 1000]
    fresh = tuple(sorted({p for p in points if p not in trials}, reverse=True))[:_PER_ROUND]
    return replace(grid, points=fresh) if fresh else None


def _quality(figures: Figures) -> QualityFigure:
    kl = figures.kl_mean
    return QualityFigure(
        kl=max(kl.value, 0.0),
        kl_ci95=(max(kl.low, 0.0), max(kl.high, 0.0)),
        tokens=figures.tokens,
    )


def _exchange(figures: Figures) -> float:
    if not figures.expected_kl:
        return 1.0
    return max(figures.kl_mean.value, 0.0) / figures.expected_kl
