"""How far a lossy policy may go: its strength is searched for the most that a measured divergence
allows."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_tool.artifacts.bundle_manifest import Calibration, QualityFigure
from moe_tool.artifacts.evaluation_report import EvaluationReport, Figures
from moe_tool.artifacts.json_fields import object_fields
from moe_tool.budget.request import MemoryRequest
from moe_tool.errors import UsageError
from moe_tool.evaluation.evaluate import EvaluateOptions, evaluate
from moe_tool.evaluation.reachable_budget import enough_tokens, least_share
from moe_tool.formats.bundle_files import MANIFEST
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.json_artifact import write_json_artifact
from moe_tool.policies.misses import MissChoice, parse_miss_policy
from moe_tool.progress import SILENT, Progress
from moe_tool.runtime.price_list import price_book
from moe_tool.text.sources import TextSource

_STRENGTHS = {"replica": "high", "near-tie": "alpha", "prune": "share", "prune:learned": "rate"}
"""The parameter that a policy's strength is, where it has an upper end"""
_REROUTE = (2.0, 0.75)
"""Other values of what re-routing has to keep, tried where stand-ins answer at all"""
_ROUNDS = 3
_PER_ROUND = 5
_CLOSE = 0.9
"""A setting that uses this much of the limit is not refined any more"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateOptions:
    """What is to be kept, and how it is measured."""

    max_kl: float
    policy: str = "priced"
    """Parameters other than the strength stay as they are given"""
    tokens: int = 8192
    seq_len: int = 256
    memory: MemoryRequest | None = None
    seed: int = 0
    threads: int | None = None
    offline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One setting that was measured."""

    policy: str
    figures: Figures

    @property
    def upper(self) -> float:
        """The end of the interval that has to keep the limit."""
        return self.figures.kl_mean.high


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationReport:
    """What was found and written."""

    bundle: str
    calibration: Calibration
    trials: tuple[Trial, ...]
    """From the strongest to the weakest"""
    bytes_read_per_token: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields of `--json`."""
        return {
            "bundle": self.bundle,
            **self.calibration.model_dump(mode="json"),
            "bytes_read_per_token": self.bytes_read_per_token,
            "trials": [{"policy": t.policy, **object_fields(t.figures)} for t in self.trials],
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

    Divergence is KL(exact || policy), token by token, each predicted after the policy's own ones;
    the upper end of its 95 % interval has to keep the limit. Nothing of the bundle but policy and
    measured quality changes.

    Args:
        folder: of the bundle.
        sources: the text, one domain each.
        options: limit and policy.
        progress: told about every measurement.

    Raises:
        UsageError: the policy has no strength to search, or the bundle lacks what it needs.
        BudgetError, DataSourceError, CorruptArtifactError: as `evaluate`.
    """
    began = time.perf_counter()
    if not 0 < options.max_kl < 100:
        raise UsageError(
            f"--max-kl {options.max_kl:g}: not possible", hint="nats per token, e.g. 0.01"
        )
    choice = parse_miss_policy(options.policy)
    with BundleReader.open(folder) as bundle:
        grid = _grid(choice, bundle)
    trials: dict[float, Trial] = {}
    slots, domains = 0, {}
    for _ in range(_ROUNDS):
        wanted = {s: choice.with_value(grid.parameter, grid.value(s)).name for s in grid.points}
        report = _measure(folder, sources, options, tuple(wanted.values()), progress)
        slots = report.setup.slots
        by_name = {row.policy: row for row in report.rows}
        for strength, name in wanted.items():
            trials[strength] = Trial(policy=name, figures=by_name[name].figures)
            domains[name] = by_name[name].domains
        finer = _refine(grid, trials, options.max_kl)
        if finer is None:
            break
        grid = finer
    kept = [s for s, trial in trials.items() if trial.upper <= options.max_kl]
    if not kept:
        raise _out_of_reach(folder, choice, min(trials.values(), key=_upper), options)
    best = trials[max(kept)]
    if "reroute" in choice.values and best.figures.substitutions_per_token > 0:
        others = tuple(
            parse_miss_policy(best.policy).with_value("reroute", share).name for share in _REROUTE
        )
        report = _measure(folder, sources, options, others, progress)
        for row in report.rows:
            domains[row.policy] = row.domains
        again = [Trial(policy=row.policy, figures=row.figures) for row in report.rows]
        best = min((best, *again), key=_upper)
    calibration = Calibration(
        policy=best.policy,
        max_kl=options.max_kl,
        quality=_quality(best.figures),
        domains={name: _quality(figures) for name, figures in domains[best.policy].items()},
        sources=tuple(f"{source.domain}={source.spec}" for source in sources),
        expert_slots=slots,
        nats_per_price=_exchange(best.figures),
    )
    with BundleReader.open(folder) as bundle:
        manifest = bundle.manifest.model_copy(update={"calibration": calibration})
    write_json_artifact(folder / MANIFEST, manifest)
    ordered = tuple(trials[strength] for strength in sorted(trials, reverse=True))
    return CalibrationReport(
        bundle=str(folder),
        calibration=calibration,
        trials=ordered,
        bytes_read_per_token=best.figures.bytes_read_per_token.value,
        seconds=time.perf_counter() - began,
    )


def _upper(trial: Trial) -> float:
    return trial.upper


def _out_of_reach(
    folder: Path, choice: MissChoice, best: Trial, options: CalibrateOptions
) -> UsageError:
    """The best that there was, and what would do."""
    mean, hints = best.figures.kl_mean.value, [f"--max-kl {best.upper * 1.05:.2g}"]
    tokens = enough_tokens(best.figures.tokens, mean=mean, upper=best.upper, max_kl=options.max_kl)
    if tokens is not None:
        hints.append(f"--tokens {max(tokens, options.tokens) * 5 // 4}, for a narrower interval")
    with BundleReader.open(folder) as bundle:
        book = price_book(bundle.manifest)
        if book is not None and choice.residents == "cheapest":
            share = least_share(
                bundle.manifest, book, max_kl=options.max_kl, nats_per_price=_exchange(best.figures)
            )
            if share is not None:
                hints.append(f"--memory {math.ceil(100 * share)}%, by the price list")
    return UsageError(
        f"no setting of {choice.kind} keeps a KL of {options.max_kl:g}: the best that was tried, "
        f"{best.policy}, has {mean:.4f} up to {best.upper:.4f}",
        hint=" or ".join(hints),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grid:
    """Strengths to be measured; a larger one saves more and costs more."""

    parameter: str
    points: tuple[float, ...]
    value: Callable[[float], float]
    """Strength -> the parameter's value"""
    middle: Callable[[float, float], float]


def _grid(choice: MissChoice, bundle: BundleReader) -> _Grid:
    if choice.kind == "priced":
        book = price_book(bundle.manifest)
        if book is None:
            raise UsageError(
                "this bundle was packed without a profile, so it has no prices to choose by",
                hint="pack it again with --profile FILE",
            )
        typical = book.typical_nats_per_mb
        points = (math.inf, *(typical * factor for factor in (0.3, 0.03, 0.003, 0.0003)))
        return _Grid(
            parameter="nats-per-mb",
            points=points,
            value=lambda s: float(f"{s:.6g}"),
            middle=lambda low, high: math.sqrt(low * high) if math.isfinite(high) else 10 * low,
        )
    inverted = choice.kind == "replica"
    top_k = bundle.manifest.shape.top_k
    most = (top_k - 1) / top_k if choice.kind == "prune:learned" else 1.0
    parameter = _STRENGTHS.get(choice.kind)
    if parameter is None:
        raise UsageError(
            f"--policy {choice.kind} has no strength to search",
            hint=f"use priced, {', '.join(_STRENGTHS)}",
        )
    return _Grid(
        parameter=parameter,
        points=(1.0, 0.75, 0.5, 0.25, 0.1),
        value=lambda s: float(f"{most * (1 - s if inverted else s):.6g}"),
        middle=lambda low, high: (low + high) / 2,
    )


def _refine(grid: _Grid, trials: dict[float, Trial], max_kl: float) -> _Grid | None:
    """Points between the strongest setting that keeps the limit and the weakest that does not."""
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
    return (
        _Grid(parameter=grid.parameter, points=fresh, value=grid.value, middle=grid.middle)
        if fresh
        else None
    )


def _measure(
    folder: Path,
    sources: Sequence[TextSource],
    options: CalibrateOptions,
    policies: tuple[str, ...],
    progress: Progress,
) -> EvaluationReport:
    return evaluate(
        folder,
        sources,
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
        progress=progress,
    )


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
