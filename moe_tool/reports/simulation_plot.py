"""Plot of hit rate and tokens per second against the budget, as image or HTML page."""

import html
import io
from pathlib import Path

from moe_tool.artifacts.simulation_report import BELADY, SimulationReport, rows_by_policy
from moe_tool.errors import UsageError

_STYLES = ("-", "--", "-.", ":")
_GIB, _MIB = 2**30, 2**20


def require_plot_path(path: Path) -> None:
    """Raise a UsageError for suffixes other than .png, .svg and .html."""
    if path.suffix.lower() not in (".png", ".svg", ".html"):
        raise UsageError(
            f"--plot {path}: the suffix names no known format", hint="use .png, .svg or .html"
        )


def drawn_plot(path: Path, report: SimulationReport, *, bits: str) -> bytes:
    """Return the bytes of a file with both plots, one curve per policy and one for the bound.

    Args:
        path: its suffix sets the format: .png, .svg or .html.
        bits: bits of the experts, in words.
    """
    require_plot_path(path)
    title = f"{report.model}, {bits}, decoding on {report.hardware}"
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = rows_by_policy(report.rows)
    largest = max(row.expert_bytes for row in report.rows)
    unit, unit_bytes = ("GiB", _GIB) if largest >= _GIB else ("MiB", _MIB)
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5.6), sharex=True)
    for number, (policy, each) in enumerate(rows.items()):
        x = [row.expert_bytes / unit_bytes for row in each]
        curves = ([100 * row.hit_rate for row in each], [row.tokens_per_second for row in each])
        for axis, y in zip(axes, curves, strict=True):
            if policy == BELADY:
                axis.plot(x, y, color="black", linewidth=2.5, label="belady (bound)", zorder=5)
            else:
                color = matplotlib.colormaps["tab10"](number % 10)
                style = _STYLES[number // 10 % len(_STYLES)]
                axis.plot(x, y, style, color=color, linewidth=1.4, marker=".", label=policy)
    cliff = report.cliff.bytes / unit_bytes
    for axis, label in zip(axes, ("hits, % of expert uses", "tokens per second"), strict=True):
        axis.set_xlabel(f"memory for experts, {unit}")
        axis.set_ylabel(label)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.axvline(cliff, color="grey", linestyle=":", linewidth=1)
        axis.annotate(
            "one token's experts",
            (cliff, 0.99),
            xycoords=("data", "axes fraction"),
            rotation=90,
            va="top",
            ha="right",
            fontsize=8,
            color="grey",
        )
    axes[0].set_ylim(bottom=0, top=102)
    axes[1].set_ylim(bottom=0)
    axes[1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.suptitle(title)
    figure.tight_layout()
    stream = io.BytesIO()
    is_page = path.suffix.lower() == ".html"
    kind = "svg" if is_page else path.suffix.lower().lstrip(".")
    figure.savefig(stream, format=kind, dpi=130)
    pyplot.close(figure)
    return _page(stream.getvalue(), title) if is_page else stream.getvalue()


def _page(picture: bytes, title: str) -> bytes:
    drawn = picture[picture.index(b"<svg") :].decode()
    return _PAGE.format(title=html.escape(title), picture=drawn).encode()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body{{font-family:sans-serif;margin:2em}}svg{{max-width:100%;height:auto}}</style></head>
<body>{picture}</body></html>
"""
