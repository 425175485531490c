"""Tables of policies: figures with their intervals, and `priced` beside each at no more bytes."""

from dataclasses import replace

from moe_tool.artifacts.evaluation_report import AtNoMoreBytes, Estimate, MetricRow, PolicyRow
from moe_tool.reports.evaluation_tables import (
    checkpoint_perplexity,
    dominance,
    equal_bytes_table,
    evaluation_table,
    harness_table,
)
from tests.reports.made_results import drawn, evaluation, figures, harness_report


def test_a_row_has_quality_then_cost_and_a_source_only_where_there_is_one() -> None:
    rows = {"drop": figures()}
    text = drawn(evaluation_table(rows))
    assert text[-1] == (
        "drop 8.000 0.2500 [0.1250, 0.5000] 0.5000 87.5% 75.0% 1.00 MiB 1.50 0.50 0.25"
    )
    assert "checkpoint" not in "\n".join(text)
    source = Estimate(value=0.5, ci95=None)
    rows["exact"] = figures(kl_source_mean=source, perplexity_source=source)
    text = drawn(evaluation_table(rows))
    assert "KL(checkpoint || it)" in "\n".join(text)
    assert " 87.5% - 75.0% " in text[-2] and " 87.5% 0.5000 75.0% " in text[-1]
    assert checkpoint_perplexity(rows["exact"]) == (
        "perplexity of the checkpoint 0.500, of the bundle under exact 7.500"
    )
    assert "checkpoint -, " in checkpoint_perplexity(rows["drop"])


def test_at_equal_bytes_both_rows_figures_stand_side_by_side() -> None:
    rows = [
        PolicyRow(policy="priced", figures=figures(kl=0.25, n_bytes=2**20), domains={}),
        PolicyRow(policy="drop", figures=figures(kl=0.5, n_bytes=2**21), domains={}),
    ]
    beside = AtNoMoreBytes(policy="drop", priced="priced", ratio=0.5, verdict="within intervals")
    report = evaluation(*rows, at_no_more_bytes=(beside,))
    assert drawn(equal_bytes_table(report))[-1] == (
        "drop 2.00 MiB 0.5000 [0.2500, 1.0000] priced 1.00 MiB 0.2500 [0.1250, 0.5000] 0.5 "
        "within intervals"
    )
    unlike = replace(beside, ratio=None)
    assert " - within" in drawn(equal_bytes_table(replace(report, at_no_more_bytes=(unlike,))))[-1]
    assert dominance(report).startswith("no other lossy policy")
    assert dominance(replace(report, dominating=(("drop", "priced"),))).endswith("drop than priced")


def test_a_metric_says_which_way_is_better_and_leaves_blank_what_is_not_known() -> None:
    row = MetricRow(
        task="arc", version="1.0", filter="none", shots=0, samples=8, metric="acc", value=0.5,
        stderr=0.125, higher_is_better=True,
    )  # fmt: skip
    group = replace(row, task="all", shots=None, samples=None, stderr=None, higher_is_better=None)
    lines = drawn(harness_table(harness_report(rows=(row, group))))
    assert lines[-2:] == ["arc none acc ↑ 0 8 0.5000 0.1250", "all none acc 0.5000"]
