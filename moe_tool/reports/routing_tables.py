"""Tables of a profile's routing: caching and prefetching figures."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest

from rich.table import Table

from moe_tool.artifacts.routing_report import (
    HotSetCoverage,
    ProfileRouting,
    ReuseHistogram,
    RoutingReport,
)
from moe_tool.reports.columns import columns

_MATRIX_PERCENT = 25
_BAR_CELLS = 24


def profile_tables(found: ProfileRouting) -> Iterator[Table]:
    """Yield a table of the layers, then the tables of the whole model."""
    report = found.routing
    yield _coverage_table(found)
    yield _hot_sets_table(report.hot_sets)
    for hot_set in report.hot_sets:
        if hot_set.domains is not None and hot_set.percent == _MATRIX_PERCENT:
            yield _domains_table(hot_set, report.domains)
    if report.next_gate:
        yield _next_gate_table(report)
    yield _union_table(report)
    if report.reuse.uses:
        yield _reuse_table(report.reuse, report.reuse_within_layer)


def _coverage_table(found: ProfileRouting) -> Table:
    """Return one row per MoE layer."""
    rows = found.coverage
    chance = f"{rows[0].coverage_by_chance:.0%}" if rows else ""
    table = columns(
        "layer",
        "load\nmax/mean",
        "entropy",
        "never\nused",
        "as previous token\n(by chance)",
        f"hottest quarter (even: {chance})\nin-sample -> held-out",
        *(f"\n{domain}" for domain in found.routing.domains),
        "\nhot set",
    )
    for row in rows:
        by_domain = zip(row.domain_coverage, row.domain_coverage_held_out, strict=True)
        table.add_row(
            str(row.layer),
            f"{row.load_skew:.2f}",
            f"{row.entropy:.3f}",
            str(row.never_used),
            f"{row.locality:.1%} ({row.locality_by_chance:.1%})",
            _then(row.coverage, row.coverage_held_out),
            *(_then(inside, outside) for inside, outside in by_domain),
            row.pin,
        )
    return table


def _then(inside: float | None, outside: float | None) -> str:
    """Format an in-sample and a held-out share."""
    return f"{_percent(inside)} -> {_percent(outside)}"


def _hot_sets_table(rows: Sequence[HotSetCoverage]) -> Table:
    has_domains = any(row.domains is not None for row in rows)
    table = columns(
        "hottest",
        "experts",
        "even",
        "in-sample",
        "held-out",
        "best set of\neach sequence",
        title="uses covered by the hottest experts, mean over layers",
    )
    if has_domains:
        for heading in ("same\ndomain", "other\ndomains"):
            table.add_column(heading, justify="right")
        table.add_column("worst pair")
    for row in rows:
        shares = [row.by_chance, row.in_sample, row.held_out, row.best_per_sequence]
        pair = []
        if row.domains is not None:
            worst = row.domains.worst
            shares += [row.domains.same_domain, row.domains.other_domain]
            pair = [f"{worst.share:.1%} ({worst.hot_in} on {worst.asked_of})" if worst else "-"]
        table.add_row(f"{row.percent} %", str(row.n_hot), *map(_percent, shares), *pair)
    return table


def _domains_table(row: HotSetCoverage, domains: Sequence[str]) -> Table:
    table = columns(
        "hot in",
        *domains,
        title=f"hottest {row.percent} % of a domain (row) on held-out text of another (column)",
    )
    assert row.domains is not None
    for domain, shares in zip(domains, row.domains.shares, strict=True):
        table.add_row(domain, *(_percent(share) for share in shares))
    return table


def _next_gate_table(report: RoutingReport) -> Table:
    table = columns(
        "layers\nahead",
        "in-sample",
        "held-out",
        "by chance",
        "largest gate weight\n(by chance)",
        "worst layer",
        "best layer",
        title="choices predicted by a router on the input of an earlier MoE layer",
    )
    for row in report.next_gate:
        prediction = row.held_out or row.in_sample
        by_layer = [
            (found.share, one.layer)
            for one in report.layers
            for each in one.next_gate
            if each.depth == row.depth and (found := each.held_out or each.in_sample)
        ]
        if prediction is None or not by_layer:
            continue
        table.add_row(
            str(row.depth),
            _percent(None if row.in_sample is None else row.in_sample.share),
            _percent(None if row.held_out is None else row.held_out.share),
            _percent(prediction.by_chance),
            f"{_percent(prediction.top_1)} ({_percent(prediction.top_1_by_chance)})",
            *(
                f"{_percent(share)} (layer {layer})"
                for share, layer in (min(by_layer), max(by_layer))
            ),
        )
    return table


def _union_table(report: RoutingReport) -> Table:
    growth = report.union_growth
    table = columns(
        "tokens in a row",
        *(str(n_tokens) for n_tokens in growth.n_tokens),
        title="distinct experts that tokens in a row use in a layer, in units of one token's",
    )
    table.add_row("mean over layers", *(_times(value) for value in growth.measured))
    by_length = [
        [value for value in values if value is not None]
        for values in zip(*(one.union_growth.measured for one in report.layers), strict=True)
    ]
    table.add_row("lowest layer", *(_times(min(values, default=None)) for values in by_length))
    table.add_row("highest layer", *(_times(max(values, default=None)) for values in by_length))
    table.add_row("independent, uniform", *(_times(value) for value in growth.by_chance))
    return table


def _reuse_table(model: ReuseHistogram, within_layer: ReuseHistogram) -> Table:
    table = columns(
        "in between",
        "all layers",
        "cache of all",
        "within the layer",
        "cache per layer",
        words=(0, 1, 3),
        title="other experts used between two uses of the same one, held-out; "
        "size: hit rate of an lru cache",
    )
    cells = (_reuse_cells(histogram) for histogram in (model, within_layer))
    for one, other in zip_longest(*cells, fillvalue=("", "", "")):
        table.add_row(one[0] or other[0], *one[1:], *other[1:])
    firsts = (_bar(one.first_uses, one.uses) for one in (model, within_layer))
    table.add_row("first use", next(firsts), "", next(firsts), "")
    return table


def _reuse_cells(histogram: ReuseHistogram) -> Iterator[tuple[str, str, str]]:
    """Yield the limits and the bar of each bin, and the hit rate of an LRU cache that covers it."""
    answered = 0
    for one in histogram.bins:
        answered += one.uses
        share = answered / histogram.uses if histogram.uses else 0.0
        label = str(one.low) if one.low == one.high else f"{one.low}-{one.high}"
        yield label, _bar(one.uses, histogram.uses), f"{one.high + 1}: {share:.1%}"


def _bar(count: int, of: int) -> str:
    share = count / of if of else 0.0
    return f"{share:6.1%} {'#' * round(share * _BAR_CELLS)}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
