"""The JSON of results: each number under one key, groups beside their neighbours."""

from dataclasses import replace

from moe_tool.artifacts.evaluation_report import PolicyRow
from moe_tool.artifacts.json_fields import json_fields
from moe_tool.artifacts.run_stats import PhaseCounters, RunStats
from tests.reports.made_results import SETUP, evaluation, figures, run_result


def test_a_run_has_its_counters_setup_and_rates_at_the_top() -> None:
    found = json_fields(run_result())
    assert found["text"] == "abc" and found["generated_tokens"] == 11
    assert (found["tokens"], found["hits"], found["misses"], found["hit_rate"]) == (10, 6, 2, 0.75)
    assert found["bytes_read_per_token"] == 2 * 2**20
    assert (found["prompt_tokens"], found["prompt_hits"], found["prompt_hit_rate"]) == (4, 3, 0.75)
    assert found["policy"] == "priced" and found["slots"] == 7
    assert found["tokens_per_second"] == 2.0 and found["decode_seconds"] == 5.0
    assert not {"setup", "prompt", "decode", "quality"} & found.keys()


def test_no_key_of_a_result_is_written_twice() -> None:
    """A spread group whose key another field has would silently win or lose."""
    result = run_result()
    groups = [result.setup, result.quality, result.prompt, result.decode]
    names = ["setup", "quality", "prompt", "decode"]
    keys = [key for name, group in zip(names, groups, strict=True) for key in group.keys_of(name)]
    own = [
        "text", "token_ids", "staying", "seconds_to_first_token", "seconds", "peak_rss_bytes",
        "row_bytes_read", "drift",
        "interrupted", "stop_reason", "generated_tokens", "decode_seconds", "tokens_per_second",
    ]  # fmt: skip
    assert len(set(keys + own)) == len(keys + own)
    assert set(json_fields(result)) == set(keys + own)


def test_an_interval_stands_beside_its_figure() -> None:
    domain = figures(kl=1.0)
    rows = [
        PolicyRow(policy="exact", figures=figures(kl=0.0), domains={"a": domain}),
        PolicyRow(policy="priced", figures=figures(kl=0.5), domains={"a": domain}),
    ]
    found = json_fields(evaluation(*rows))
    assert (found["kl_mean"], found["kl_mean_ci95"]) == (0.5, [0.25, 1.0])
    assert found["perplexity_source"] is None
    assert [row["kl_mean"] for row in found["rows"]] == [0.0, 0.5]
    assert found["domains"]["a"]["kl_mean"] == 1.0


def test_counters_add_up_field_by_field() -> None:
    one = PhaseCounters(hits=1, misses=2, bytes_read=3, stall_seconds=0.5, drops=4)
    two = PhaseCounters(hits=10, tokens=20, stall_seconds=0.25)
    both = PhaseCounters(hits=11, misses=2, bytes_read=3, stall_seconds=0.75, drops=4, tokens=20)
    assert one + two == both and one.hits == 1
    assert sum([one, two], PhaseCounters()) == both
    whole = RunStats(prompt=one, decode=two) + RunStats(prompt=two, decode=one)
    assert whole == RunStats(prompt=both, decode=both)


def test_rates_of_nothing() -> None:
    none = PhaseCounters()
    assert (none.hit_rate, none.prefetch_hit_rate, none.sparsity) == (1.0, 0.0, 0.0)
    assert none.bytes_read_per_token == none.whole_bytes_per_token == 0.0
    assert none.skipped_fetch_bytes_per_token == 0.0
    assert run_result(token_ids=(1,), seconds=1.0).tokens_per_second == 0.0
    assert json_fields(replace(SETUP, sparse_experts=0.5))["sparse_experts"] == 0.5
