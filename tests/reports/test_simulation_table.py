"""Replayed rows as tables: a dash where a policy has no row, and the best of each budget."""

from pathlib import Path

from moe_tool.artifacts.simulation_report import (
    BELADY,
    Cliff,
    PolicyHits,
    PromptRow,
    RunComparison,
    SimulationReport,
    rows_by_policy,
)
from moe_tool.reports.simulation_plot import drawn_plot
from moe_tool.reports.simulation_table import (
    comparison_table,
    details_table,
    hit_rate_table,
    policies_table,
    prompt_table,
)
from tests.reports.made_results import drawn, simulated

ROWS = (
    simulated(memory="20%", slots=2, hit_rate=0.25, tokens_per_second=5.0),
    simulated(memory="20%", slots=2, eviction=BELADY, hit_rate=0.5, tokens_per_second=8.0),
    simulated(memory="50%", tokens_per_second=120.0, to_belady=None),
    simulated(memory="50%", eviction="lfu", tokens_per_second=121.0),
    simulated(memory="50%", eviction=BELADY, tokens_per_second=130.0),
)


def made_report() -> SimulationReport:
    return SimulationReport(
        profile=Path("p.h5"), model="<tiny>", hardware="laptop", bits="4", part="held-out",
        tokens=8, experts=10, rows=ROWS, gaps=(), prompt_rows=(), unheard=(), prefetch_rows=(),
        cliff=Cliff(experts=4.0, bytes=4 * 2**20), warnings=(), accesses_per_second=1.0,
    )  # fmt: skip


def test_policies_are_lines_budgets_are_columns_and_the_bound_is_last() -> None:
    lines = drawn(hit_rate_table(rows_by_policy(ROWS)))
    assert lines == [
        "eviction 20% 50%", "lru 25% 5.0 50% 120", "lfu - 50% 121", "belady 50% 8.0 50% 130",
    ]  # fmt: skip


def test_the_best_of_a_budget_is_never_the_bound() -> None:
    best = made_report().best()
    assert [(row.memory, row.eviction) for row in best] == [("20%", "lru"), ("50%", "lfu")]
    assert drawn(details_table(best))[-1] == (
        "50% 5 5.00 MiB lfu 50.0% 2.00 MiB 1.0 121 1.0 2.0 1.25 policy"
    )
    assert drawn(details_table(ROWS))[3].endswith("1.0 2.0 - policy")


def test_prompts_have_hits_and_bytes() -> None:
    row = PromptRow(
        memory="20%", eviction="lru", hit_rate=0.5, belady_hit_rate=0.5, bytes_per_token=2**20
    )
    assert drawn(prompt_table([row]))[-1] == "lru 50% 1.00 MiB"


def test_a_run_stands_beside_its_replay() -> None:
    found = RunComparison(
        hits=5, predicted_hits=6, prompt_hits=7, predicted_prompt_hits=7, prefetch_hits=0,
        predicted_prefetch_hits=0, tokens_per_second=2.0, predicted_tokens_per_second=2.5,
        stall_ms=1.0, predicted_stall_ms=1.5, policies=(),
    )  # fmt: skip
    assert drawn(comparison_table(found))[1:] == [
        "hits while decoding 5 6",
        "hits in the prompt 7 7",
        "prefetched and wanted 0 0",
        "tokens/s 2.00 2.50",
        "stall, ms per token 1.0 1.5",
    ]
    assert not found.is_equal
    hits = PolicyHits(eviction="lru", hit_rate=0.5, bytes_per_token=2.0**20)
    assert drawn(policies_table([hits]))[-1] == "lru 50.0% 1.00 MiB"


def test_a_page_is_one_picture_under_an_escaped_title() -> None:
    page = drawn_plot(Path("a.html"), made_report(), bits="4 bits").decode()
    assert "<title>&lt;tiny&gt;, 4 bits, decoding on laptop</title>" in page
    assert page.count("<svg") == 1 and page.rstrip().endswith("</html>")
    assert drawn_plot(Path("a.png"), made_report(), bits="4 bits").startswith(b"\x89PNG")
