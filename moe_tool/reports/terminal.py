"""Tables for a terminal, drawn from what the stages report.

The rows are told by their attributes alone, so that this file stands below the rooms that measure.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from rich import box
from rich.table import Table

from moe_tool.budget.sizes import format_bytes

Interval = tuple[float, float] | None


class CoverageRow(Protocol):
    """How one MoE layer uses its experts."""

    @property
    def layer(self) -> int: ...
    @property
    def load_skew(self) -> float: ...
    @property
    def entropy(self) -> float: ...
    @property
    def never_used(self) -> int: ...
    @property
    def locality(self) -> float: ...
    @property
    def locality_by_chance(self) -> float: ...
    @property
    def coverage(self) -> float: ...
    @property
    def coverage_by_chance(self) -> float: ...
    @property
    def coverage_held_out(self) -> float | None: ...
    @property
    def domain_coverage(self) -> tuple[float | None, ...]: ...
    @property
    def domain_coverage_held_out(self) -> tuple[float | None, ...]: ...


class PriceRow(Protocol):
    """What stand-ins leave as error, of one layer or of all."""

    @property
    def price_in_sample(self) -> float: ...
    @property
    def price_held_out(self) -> float: ...
    @property
    def price_best_held_out(self) -> float: ...
    @property
    def price_drop(self) -> float: ...


class LayerPriceRow(PriceRow, Protocol):
    """The same of one layer, with what it rests on."""

    @property
    def layer(self) -> int: ...
    @property
    def n_without(self) -> int: ...
    @property
    def n_fell_back(self) -> int: ...


class EvaluationFigures(Protocol):
    """What one policy cost on one text."""

    @property
    def perplexity(self) -> float: ...
    @property
    def perplexity_ci95(self) -> Interval: ...
    @property
    def perplexity_exact(self) -> float: ...
    @property
    def perplexity_exact_ci95(self) -> Interval: ...
    @property
    def perplexity_source(self) -> float | None: ...
    @property
    def perplexity_source_ci95(self) -> Interval: ...
    @property
    def kl_mean(self) -> float: ...
    @property
    def kl_mean_ci95(self) -> Interval: ...
    @property
    def kl_p99(self) -> float: ...
    @property
    def top1_agreement(self) -> float: ...
    @property
    def kl_source_mean(self) -> float | None: ...
    @property
    def kl_source_mean_ci95(self) -> Interval: ...
    @property
    def hit_rate(self) -> float: ...
    @property
    def bytes_read_per_token(self) -> float: ...
    @property
    def substitutions_per_token(self) -> float: ...
    @property
    def lowered_per_token(self) -> float: ...
    @property
    def drops_per_token(self) -> float: ...


def facts_table(facts: Mapping[str, object]) -> Table:
    """Return two columns, name and value; a field whose name ends in `bytes` is shown as a size."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), _fact(name, value))
    return table


def coverage_table(
    rows: Sequence[CoverageRow], domains: Sequence[str], verdicts: Sequence[str]
) -> Table:
    """Return one row per MoE layer.

    Args:
        rows: the layers.
        domains: labels of the text, in the order of the rows' domain figures.
        verdicts: per layer, whether its hottest quarter is worth keeping in memory.
    """
    chance = f"{rows[0].coverage_by_chance:.0%}" if rows else ""
    table = _table(
        "layer",
        "load\nmax/mean",
        "entropy",
        "never\nused",
        "as previous token\n(by chance)",
        f"hottest quarter (even: {chance})\nin-sample -> held-out",
        *(f"\n{domain}" for domain in domains),
        "\nhot set",
    )
    for row, verdict in zip(rows, verdicts, strict=True):
        by_domain = zip(row.domain_coverage, row.domain_coverage_held_out, strict=True)
        table.add_row(
            str(row.layer),
            f"{row.load_skew:.2f}",
            f"{row.entropy:.3f}",
            str(row.never_used),
            f"{row.locality:.1%} ({row.locality_by_chance:.1%})",
            _then(row.coverage, row.coverage_held_out),
            *(_then(inside, outside) for inside, outside in by_domain),
            verdict,
        )
    return table


def buddies_table(rows: Sequence[LayerPriceRow], mean: PriceRow) -> Table:
    """Return one row per MoE layer, and their mean."""
    table = _table(
        "layer",
        "in-sample",
        "held-out",
        "best possible",
        "nothing instead",
        "experts without\na stand-in",
        "experts with\nfew tokens",
    )
    for row in rows:
        table.add_row(str(row.layer), *_prices(row), str(row.n_without), str(row.n_fell_back))
    table.add_section()
    table.add_row("mean", *_prices(mean), "", "")
    return table


def evaluation_table(rows: Sequence[tuple[str, EvaluationFigures]]) -> Table:
    """Return one row per (label, figures): quality with its 95 % interval, then what it cost."""
    has_source = any(figures.kl_source_mean is not None for _, figures in rows)
    table = _table("", "perplexity", "KL(exact || it)", "99 %", "top-1")
    if has_source:
        table.add_column("KL(checkpoint || it)", justify="right")
    for heading in ("hit rate", "read/token", "substituted", "lowered", "dropped"):
        table.add_column(heading, justify="right")
    for label, figures in rows:
        source = [_estimate(figures.kl_source_mean, figures.kl_source_mean_ci95, 4)]
        table.add_row(
            label,
            _estimate(figures.perplexity, figures.perplexity_ci95, 3),
            _estimate(figures.kl_mean, figures.kl_mean_ci95, 4),
            f"{figures.kl_p99:.4f}",
            f"{figures.top1_agreement:.1%}",
            *(source if has_source else []),
            f"{figures.hit_rate:.1%}",
            format_bytes(figures.bytes_read_per_token),
            f"{figures.substitutions_per_token:.2f}",
            f"{figures.lowered_per_token:.2f}",
            f"{figures.drops_per_token:.2f}",
        )
    return table


class EqualBytes(Protocol):
    """A policy beside what answering by price costs that reads no more."""

    @property
    def policy(self) -> str: ...
    @property
    def bytes_read_per_token(self) -> float: ...
    @property
    def kl(self) -> float: ...
    @property
    def kl_ci95(self) -> tuple[float, float] | None: ...
    @property
    def priced(self) -> str: ...
    @property
    def priced_bytes_read_per_token(self) -> float: ...
    @property
    def priced_kl(self) -> float: ...
    @property
    def priced_kl_ci95(self) -> tuple[float, float] | None: ...
    @property
    def ratio(self) -> float | None: ...
    @property
    def verdict(self) -> str: ...


def equal_bytes_table(rows: Sequence[EqualBytes]) -> Table:
    """Return one row per policy: its bytes and divergence, then those of `priced`."""
    table = _table("", "read/token", "KL(exact || it)")
    table.add_column("at no more bytes")
    for heading in ("read/token", "KL(exact || it)", "KL / KL"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for row in rows:
        table.add_row(
            row.policy,
            format_bytes(row.bytes_read_per_token),
            _estimate(row.kl, row.kl_ci95, 4),
            row.priced,
            format_bytes(row.priced_bytes_read_per_token),
            _estimate(row.priced_kl, row.priced_kl_ci95, 4),
            "-" if row.ratio is None else f"{row.ratio:.3g}",
            row.verdict,
        )
    return table


def checkpoint_perplexity(figures: EvaluationFigures) -> str:
    """Return the reference's own perplexity beside that of the bundle under exact, on one line."""
    own = _estimate(figures.perplexity_source, figures.perplexity_source_ci95, 3)
    exact = _estimate(figures.perplexity_exact, figures.perplexity_exact_ci95, 3)
    return f"perplexity of the checkpoint {own}, of the bundle under exact {exact}"


def stages_table(rows: Sequence[tuple[str, str, float]]) -> Table:
    """Return one row per (stage, what came out, seconds)."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("stage", "what happened"):
        table.add_column(heading)
    table.add_column("seconds", justify="right")
    for stage, outcome, seconds in rows:
        table.add_row(stage, outcome, f"{seconds:.1f}")
    return table


def _table(*headings: str) -> Table:
    """A table whose first column is a label and whose others are numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for position, heading in enumerate(headings):
        table.add_column(heading, justify="left" if position == 0 else "right")
    return table


def _prices(row: PriceRow) -> list[str]:
    prices = (row.price_in_sample, row.price_held_out, row.price_best_held_out, row.price_drop)
    return [f"{price:.3f}" for price in prices]


def _then(inside: float | None, outside: float | None) -> str:
    """In-sample, then held-out."""
    return " -> ".join("-" if share is None else f"{share:.1%}" for share in (inside, outside))


def _estimate(value: float | None, interval: Interval, digits: int) -> str:
    if value is None:
        return "-"
    shown = f"{value:.{digits}f}"
    if interval is not None:
        shown += f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"
    return shown


def _fact(name: str, value: object) -> str:
    if value is None:
        return "none"
    if name.endswith("bytes") and isinstance(value, int):
        return f"{format_bytes(value)} ({value})"
    if isinstance(value, list | tuple):
        return ", ".join(str(entry) for entry in value)
    return str(value)
