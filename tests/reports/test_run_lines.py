"""What a run cost, on one line: every part by hand, and none of what did not happen."""

from dataclasses import replace

from moe_tool.artifacts.run_result import DriftSeen
from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.reports.run_lines import harness_line, run_line
from tests.reports.made_results import QUALITY, SETUP, harness_report, run_result


def test_an_exact_run_has_rates_and_nothing_else() -> None:
    assert run_line(run_result()) == (
        "4 + 11 tokens · first after 1.00 s · 2.0 tokens/s · hit rate 75.0% · "
        "2.00 MiB read per token · stalled 0.50 s · 0 substitutions · "
        "peak memory 1.00 GiB of 2.00 GiB"
    )


def test_what_changed_is_named_before_the_memory() -> None:
    counters = PhaseCounters(
        tokens=10, prefetches=4, prefetch_hits=3, prefetched_bytes=2**20, substitutions=5,
        replica_answers=6, drops=7, skipped_fetch_bytes=10 * 2**20, channels=8, channels_used=2,
        bytes_read=2**20, whole_bytes=4 * 2**20,
    )  # fmt: skip
    quality = replace(
        QUALITY, expected_kl=0.01, expected_kl_limit=0.5, exact_fallback_tokens=2,
        prompt_expected_kl=0.25, shadow_tokens=3, shadow_kl=0.125, shadow_seconds=1.5,
    )  # fmt: skip
    result = run_result(
        setup=replace(SETUP, sparse_experts=0.75),
        prompt=PhaseCounters(tokens=4, substitutions=1, replica_answers=2, drops=3),
        decode=counters,
        quality=quality,
    )
    assert run_line(result).split(" · ")[6:] == [
        "5 substitutions",
        "4 prefetches (3 used, 1.00 MiB)",
        "75.0% of channels skipped, 25% of whole misses read",
        "6 by replicas",
        "7 drops (1.00 MiB per token not read for them)",
        "in the prompt 1 substitutions, 2 by replicas, 3 drops, expected KL 0.2500 per token",
        "expected KL 0.0100 per token of 0.5, 2 tokens answered exactly to keep it, measured "
        "0.1250 a step on 3 of them, where 0.0000 was expected (1.5 s)",
        "peak memory 1.00 GiB of 2.00 GiB",
    ]


def test_tasks_count_requests_that_lost_their_beginning() -> None:
    assert harness_line(harness_report()) == (
        "20 + 5 tokens · 3 contexts cut at the beginning · 2.0 s · hit rate 100.0% · 0 B read per "
        "token · stalled 0.00 s · 0 substitutions · 2 drops (0 B per token not read for them) · "
        "peak memory 1.00 GiB of 2.00 GiB"
    )


def test_drift_is_said_where_it_was_seen() -> None:
    seen = DriftSeen(
        window_tokens=64, windows=4, alarms=1, first_alarm_tokens=96, is_drifting=True, score=1.5
    )
    said = "1 of 4 windows of 64 tokens routed unlike the profile's"
    assert said in run_line(run_result(drift=seen))
    assert "unlike" not in run_line(run_result(drift=replace(seen, alarms=0)))
