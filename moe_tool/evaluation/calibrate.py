"""Search the strongest setting of a lossy policy whose measured divergence keeps a limit."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_tool.artifacts.bundle_manifest import BundleManifest, Calibration
from moe_tool.artifacts.evaluation_report import Figures
from moe_tool.artifacts.json_fields import object_fields
from moe_tool.artifacts.quality_figure import QualityFigure
from moe_tool.budget.request import MemoryRequest
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
class CalibrateOptions:
    """KL limit, policy, and settings of the measurement."""

    max_kl: float
    policy: MissChoice = PRICED_POLICY
    """Policy to search; its parameters other than the strength stay fixed"""
    tokens: int = 8192
    seq_len: int = 256
    memory: MemoryRequest | None = None
    seed: int = 0
    threads: int | None = None
    offline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One measured setting."""

    policy: MissChoice
    figures: Figures
    domains: Mapping[str, Figures]
    """Figures of each domain of the text"""

    @property
    def upper(self) -> float:
        """Upper end of the KL interval, which has to keep the limit."""
        return self.figures.kl_mean.high


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
    options: CalibrateOptions,
    *,
    progress: Progress = SILENT,
) -> CalibrationReport:
    """Find the strongest setting whose divergence keeps the limit, and write it into the manifest.

    Divergence is KL(exact || policy) per token, each predicted from context that the policy
    computed; the upper end of its 95 % interval has to keep the limit. Only the manifest's
    calibration changes.

    Args:
        folder: the bundle.
        sources: the text, one domain each.
        options: limit and policy.
        progress: listener.

    Raises:
        UsageError: the policy has no strength to search, no setting keeps the limit, or the bundle
            lacks what the policy needs.
        BudgetError, DataSourceError, CorruptArtifactError: as `evaluate`.
    """
    began = time.perf_counter()
    if not 0 < options.max_kl < 100:
        raise UsageError(
            f"--max-kl {options.max_kl:g}: not possible", hint="nats per token, e.g. 0.01"
        )
    with BundleReader.open(folder) as bundle:
        manifest = bundle.manifest
    bench = _Bench(folder, sources, options, progress)
    trials = _search(bench, options.policy, _first_grid(options.policy, manifest), options.max_kl)
    kept = [strength for strength, trial in trials.items() if trial.upper <= options.max_kl]
    if not kept:
        raise _out_of_reach(manifest, min(trials.values(), key=_upper), options)
    best = _best_alternative(bench, trials[max(kept)])
    calibration = Calibration(
        policy=best.policy.name,
        max_kl=options.max_kl,
        quality=_quality(best.figures),
        domains={name: _quality(figures) for name, figures in best.domains.items()},
        sources=tuple(f"{source.domain}={source.spec}" for source in sources),
        expert_slots=bench.slots,
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


class _Bench:
    """Measures settings of one bundle on one text."""

    def __init__(
        self,
        folder: Path,
        sources: Sequence[TextSource],
        options: CalibrateOptions,
        progress: Progress,
    ) -> None:
        self._folder = folder
        self._sources = sources
        self._options = options
        self._progress = progress
        self.slots = 0
        """Expert slots of the last measurement"""

    def measure(self, policies: tuple[MissChoice, ...]) -> list[Trial]:
        """Return one trial per setting, in order."""
        options = self._options
        report = evaluate(
            self._folder,
            self._sources,
            EvaluateOptions(
                tokens=options.tokens,
                seq_len=options.seq_len,
                memory=options.memory,
                policy=policies[0],
                also=policies[1:],
                exact_fallback=False,
                residency="frozen",
                seed=options.seed,
                threads=options.threads,
                offline=options.offline,
            ),
            progress=self._progress,
        )
        self.slots = report.setup.slots
        rows = {row.policy: row for row in report.rows}
        found = [(policy, rows[policy.name]) for policy in policies]
        return [
            Trial(policy=policy, figures=row.figures, domains=row.domains) for policy, row in found
        ]


def _search(
    bench: _Bench, choice: MissChoice, grid: StrengthGrid, max_kl: float
) -> dict[float, Trial]:
    """Return all trials by strength."""
    strength = choice.spec.strength
    assert strength is not None
    trials: dict[float, Trial] = {}
    for _ in range(_ROUNDS):
        policies = (choice.with_value(strength.parameter, grid.value(s)) for s in grid.points)
        trials.update(zip(grid.points, bench.measure(tuple(policies)), strict=True))
        finer = _refine(grid, trials, max_kl)
        if finer is None:
            break
        grid = finer
    return trials


def _best_alternative(bench: _Bench, best: Trial) -> Trial:
    """Return the best of a setting and its policy's alternatives at the same strength."""
    policies = tuple(
        best.policy.with_value(parameter, value)
        for parameter, values in best.policy.spec.alternatives.items()
        for value in values
    )
    if not policies or not best.figures.substitutions_per_token:
        return best
    return min((best, *bench.measure(policies)), key=_upper)


def _upper(trial: Trial) -> float:
    return trial.upper


def _out_of_reach(manifest: BundleManifest, best: Trial, options: CalibrateOptions) -> UsageError:
    """Return the refusal: the best trial, and limits, text or memory that would suffice."""
    mean, hints = best.figures.kl_mean.value, [f"--max-kl {best.upper * 1.05:.2g}"]
    tokens = enough_tokens(best.figures.tokens, mean=mean, upper=best.upper, max_kl=options.max_kl)
    if tokens is not None:
        hints.append(f"--tokens {max(tokens, options.tokens) * 5 // 4}, for a narrower interval")
    book = price_book(manifest)
    if book is not None and best.policy.residents == "cheapest":
        share = least_share(
            manifest, book, max_kl=options.max_kl, nats_per_price=_exchange(best.figures)
        )
        if share is not None:
            hints.append(f"--memory {math.ceil(100 * share)}%, by the price list")
    return UsageError(
        f"no setting of {best.policy.kind} keeps a KL of {options.max_kl:g}: the best one, "
        f"{best.policy.name}, has {mean:.4f} with an upper end of {best.upper:.4f}",
        hint=" or ".join(hints),
    )


def _first_grid(choice: MissChoice, manifest: BundleManifest) -> StrengthGrid:
    strength = choice.spec.strength
    if strength is None:
        able = [name for name, spec in MISS_POLICIES.items() if spec.strength is not None]
        raise UsageError(
            f"--policy {choice.kind} has no strength to search", hint=f"use {', '.join(able)}"
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
