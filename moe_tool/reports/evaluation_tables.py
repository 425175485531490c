"""Tables of evaluations: figures of policies on text, and metrics of lm_eval's tasks."""

from collections.abc import Mapping

from rich.table import Table

from moe_tool.artifacts.evaluation_report import Estimate, EvaluationReport, Figures, HarnessReport
from moe_tool.budget.sizes import format_bytes
from moe_tool.reports.columns import columns


def evaluation_table(rows: Mapping[str, Figures]) -> Table:
    """Return one row per label: quality with its 95 % interval, then costs."""
    has_source = any(figures.kl_source_mean is not None for figures in rows.values())
    source_heading = ["KL(checkpoint || it)"] if has_source else []
    quality = ("perplexity", "KL(exact || it)", "99 %", "top-1", *source_heading)
    costs = ("hit rate", "read/token", "substituted", "by replicas", "dropped")
    table = columns("", *quality, *costs)
    for label, figures in rows.items():
        source = [_estimate(figures.kl_source_mean, 4)]
        table.add_row(
            label,
            _estimate(figures.perplexity, 3),
            _estimate(figures.kl_mean, 4),
            f"{figures.kl_p99.value:.4f}",
            f"{figures.top1_agreement.value:.1%}",
            *(source if has_source else []),
            f"{figures.hit_rate.value:.1%}",
            format_bytes(figures.bytes_read_per_token.value),
            f"{figures.substitutions_per_token:.2f}",
            f"{figures.replica_answers_per_token:.2f}",
            f"{figures.drops_per_token:.2f}",
        )
    return table


def equal_bytes_table(report: EvaluationReport) -> Table:
    """Return one row per policy: its bytes and divergence, then those of `priced`."""
    figures = report.by_policy()
    pair = ("read/token", "KL(exact || it)")
    table = columns("", *pair, "at no more bytes", *pair, "KL / KL", "", words=(0, 3, 7))
    for row in report.at_no_more_bytes:
        table.add_row(
            row.policy,
            *_bytes_and_kl(figures[row.policy]),
            row.priced,
            *_bytes_and_kl(figures[row.priced]),
            "-" if row.ratio is None else f"{row.ratio:.3g}",
            row.verdict,
        )
    return table


def dominance(report: EvaluationReport) -> str:
    """Return a line on the policies with both fewer bytes and a lower KL than `priced`."""
    if not report.dominating:
        return (
            "no other lossy policy has both fewer bytes and a lower KL than priced, beyond the "
            "intervals"
        )
    return "both fewer bytes and a lower KL, beyond the intervals: " + ", ".join(
        f"{policy} than {setting}" for policy, setting in report.dominating
    )


def checkpoint_perplexity(figures: Figures) -> str:
    """Return a line with the perplexities of the checkpoint and of the bundle under exact."""
    own = _estimate(figures.perplexity_source, 3)
    exact = _estimate(figures.perplexity_exact, 3)
    return f"perplexity of the checkpoint {own}, of the bundle under exact {exact}"


def harness_table(report: HarnessReport) -> Table:
    """Return a row per figure; an arrow points to better values."""
    headings = ("task", "filter", "metric", "shots", "documents", "value", "± stderr")
    table = columns(*headings, words=(0, 1, 2))
    for row in report.rows:
        arrow = {True: " ↑", False: " ↓", None: ""}[row.higher_is_better]
        table.add_row(
            row.task,
            row.filter,
            f"{row.metric}{arrow}",
            "" if row.shots is None else str(row.shots),
            "" if row.samples is None else str(row.samples),
            f"{row.value:.4f}",
            "" if row.stderr is None else f"{row.stderr:.4f}",
        )
    return table


def _bytes_and_kl(figures: Figures) -> tuple[str, str]:
    return format_bytes(figures.bytes_read_per_token.value), _estimate(figures.kl_mean, 4)


def _estimate(found: Estimate | None, digits: int) -> str:
    if found is None:
        return "-"
    shown = f"{found.value:.{digits}f}"
    if found.ci95 is not None:
        shown += f" [{found.ci95[0]:.{digits}f}, {found.ci95[1]:.{digits}f}]"
    return shown
