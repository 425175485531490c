"""The tables of a profile's routing say what was measured, and a dash where nothing was."""

from moe_tool.artifacts.routing_report import (
    DomainPair,
    DomainTransfer,
    GatePrediction,
    HotSetCoverage,
    LayerRouting,
    NextGate,
    ProfileRouting,
    ReuseBin,
    ReuseHistogram,
    RoutingReport,
    UnionGrowth,
)
from moe_tool.reports.routing_tables import profile_tables
from tests.reports.made_results import drawn, layer_coverage

GROWTH = UnionGrowth(n_tokens=(1, 2, 3), measured=(1.0, 1.5, None), by_chance=(1.0, 1.75, 2.25))
NOTHING = ReuseHistogram(
    uses=0,
    first_uses=0,
    bins=(ReuseBin(low=0, high=0, uses=0), ReuseBin(low=1, high=1, uses=0)),
)


def hot_set(domains: DomainTransfer | None, held_out: float | None) -> HotSetCoverage:
    return HotSetCoverage(
        percent=25,
        n_hot=2,
        by_chance=0.25,
        in_sample=0.4,
        held_out=held_out,
        best_per_sequence=held_out,
        domains=domains,
    )


def prediction(share: float) -> GatePrediction:
    return GatePrediction(
        n_tokens=9, share=share, by_chance=0.25, top_1=0.875, top_1_by_chance=0.3125
    )


def report(
    *,
    domains: DomainTransfer | None = None,
    held_out: float | None = 0.3,
    next_gates: tuple[tuple[NextGate, ...], ...] = ((), ()),
    reuse: ReuseHistogram = NOTHING,
    within: ReuseHistogram = NOTHING,
) -> RoutingReport:
    hot_sets = (hot_set(domains, held_out),)
    layers = tuple(
        LayerRouting(
            layer=layer, hot_sets=hot_sets, next_gate=gates, union_growth=GROWTH, reuse=within
        )
        for layer, gates in zip((0, 2), next_gates, strict=True)
    )
    return RoutingReport(
        domains=("docs", "[code]"),
        hot_sets=hot_sets,
        next_gate=next_gates[1],
        union_growth=GROWTH,
        reuse=reuse,
        reuse_within_layer=within,
        layers=layers,
    )


def tables(made: RoutingReport) -> list[str]:
    return drawn(*profile_tables(ProfileRouting(coverage=(layer_coverage(),), routing=made)))


def test_a_layer_has_its_own_row_with_a_column_for_each_domain() -> None:
    lines = tables(report())
    assert "docs [code] hot set" in " ".join(lines[:4])
    assert "3 1.50 0.875 1 25.0% (12.5%) 40.0% -> - 50.0% -> - 25.0% -> 12.5% unknown" in lines


def test_domains_have_a_matrix_and_a_worst_pair() -> None:
    lines = tables(
        report(
            domains=DomainTransfer(
                shares=((0.5, 0.125), (None, 0.625)),
                same_domain=0.5625,
                other_domain=0.125,
                worst=DomainPair(hot_in="docs", asked_of="[code]", share=0.125),
            )
        )
    )
    assert "25 % 2 25.0% 40.0% 30.0% 30.0% 56.2% 12.5% 12.5% (docs on [code])" in lines
    assert "docs 50.0% 12.5%" in lines and "[code] - 62.5%" in lines


def test_what_was_not_measured_is_a_dash_and_no_empty_table() -> None:
    lines = tables(report(held_out=None))
    assert "25 % 2 25.0% 40.0% - -" in lines
    text = "\n".join(lines)
    assert "worst pair" not in text and "earlier MoE layer" not in text
    assert "between two uses" not in text
    assert "mean over layers 1.00 1.50 -" in lines
    assert "highest layer 1.00 1.50 -" in lines
    assert "independent, uniform 1.00 1.75 2.25" in lines


def test_next_gates_are_held_out_where_something_is() -> None:
    gate = NextGate(depth=1, from_layer=0, in_sample=prediction(0.5), held_out=prediction(0.75))
    lines = tables(report(next_gates=((), (gate,))))
    assert "1 50.0% 75.0% 25.0% 87.5% (31.2%) 75.0% (layer 2) 75.0% (layer 2)" in lines
    gate = NextGate(depth=1, from_layer=0, in_sample=prediction(0.5), held_out=None)
    lines = tables(report(next_gates=((), (gate,))))
    assert "1 50.0% - 25.0% 87.5% (31.2%) 50.0% (layer 2) 50.0% (layer 2)" in lines


def test_reuse_adds_up_to_what_caches_answer() -> None:
    model = ReuseHistogram(
        uses=8,
        first_uses=2,
        bins=(
            ReuseBin(low=0, high=0, uses=1),
            ReuseBin(low=1, high=1, uses=2),
            ReuseBin(low=2, high=3, uses=3),
        ),
    )
    within = ReuseHistogram(
        uses=8,
        first_uses=2,
        bins=(ReuseBin(low=0, high=0, uses=6), ReuseBin(low=1, high=1, uses=0)),
    )
    lines = tables(report(reuse=model, within=within))
    assert "0 12.5% ### 1: 12.5% 75.0% ################## 1: 75.0%" in lines
    assert "1 25.0% ###### 2: 37.5% 0.0% 2: 75.0%" in lines
    assert "2-3 37.5% ######### 4: 75.0%" in lines
    assert "first use 25.0% ###### 25.0% ######" in lines
