"""Results made up for tables and lines, and the tables as plain lines."""

import io
from typing import Any

from rich.console import Console

from moe_tool.artifacts.evaluation_report import (
    Estimate,
    EvaluationReport,
    Figures,
    HarnessReport,
    PolicyRow,
)
from moe_tool.artifacts.routing_report import LayerCoverage
from moe_tool.artifacts.run_result import AnswerQuality, RunResult, RunSetup
from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.artifacts.simulation_report import SimulatedRow

SETUP = RunSetup(
    policy="priced",
    residency="frozen",
    eviction="lru",
    prefetch="none",
    sparse_experts=None,
    activations="float32",
    table_bytes_on_disk=0,
    threads=2,
    memory_budget_bytes=2 * 2**30,
    slots=7,
)
QUALITY = AnswerQuality(
    expected_kl=None,
    expected_kl_limit=None,
    exact_fallback_tokens=0,
    prompt_expected_kl=None,
    shadow_tokens=0,
    shadow_kl=None,
    shadow_expected_kl=None,
    shadow_seconds=0.0,
    price_factor=None,
    nats_per_mb=None,
)


def drawn(*what: Any) -> list[str]:
    """Return the lines that a terminal shows, without padding and blank ones."""
    stream = io.StringIO()
    console = Console(file=stream, width=200, markup=False, emoji=False, highlight=False)
    console.print(*what, sep="\n", soft_wrap=True)
    lines = (" ".join(line.split()) for line in stream.getvalue().splitlines())
    return [line for line in lines if line]


def simulated(**changed: Any) -> SimulatedRow:
    """Return one budget under one policy."""
    fields: dict[str, Any] = {
        "memory": "50%", "slots": 5, "expert_bytes": 5 * 2**20, "eviction": "lru", "hit_rate": 0.5,
        "bytes_per_token": 2.0 * 2**20, "stall_ms": 1.0, "tokens_per_second": 10.0, "p50_ms": 1.0,
        "p99_ms": 2.0, "belady_hit_rate": 0.6, "to_belady": 1.25, "limited_by": "policy",
    }  # fmt: skip
    return SimulatedRow(**(fields | changed))


def run_result(**changed: Any) -> RunResult:
    """Return a run of 4 prompt tokens and 11 generated ones: 10 decoded in 5 seconds."""
    fields: dict[str, Any] = {
        "text": "abc",
        "token_ids": tuple(range(11)),
        "setup": SETUP,
        "staying": {},
        "prompt": PhaseCounters(forwards=1, tokens=4, hits=3, misses=1, bytes_read=2**20),
        "decode": PhaseCounters(
            forwards=10, tokens=10, hits=6, misses=2, bytes_read=20 * 2**20, stall_seconds=0.5
        ),
        "quality": QUALITY,
        "drift": None,
        "row_bytes_read": 0,
        "seconds_to_first_token": 1.0,
        "seconds": 6.0,
        "peak_rss_bytes": 2**30,
        "interrupted": False,
        "stop_reason": "max_tokens",
    }
    return RunResult(**(fields | changed))


def figures(*, kl: float = 0.25, n_bytes: float = 2**20, **changed: Any) -> Figures:
    """Return figures with an interval for KL alone."""
    alone = {
        name: Estimate(value=value, ci95=None)
        for name, value in {
            "perplexity": 8.0, "perplexity_exact": 7.5, "kl_p99": 0.5, "top1_agreement": 0.875,
            "hit_rate": 0.75, "bytes_read_per_token": n_bytes,
        }.items()
    }  # fmt: skip
    fields: dict[str, Any] = {
        "tokens": 64,
        "kl_mean": Estimate(value=kl, ci95=(kl / 2, 2 * kl)),
        "perplexity_source": None,
        "kl_source_mean": None,
        "kl_source_exact_mean": None,
        "substitutions_per_token": 1.5,
        "replica_answers_per_token": 0.5,
        "drops_per_token": 0.25,
        "expected_kl": None,
        "exact_fallback_share": 0.0,
    }
    return Figures(**(alone | fields | changed))


def evaluation(*rows: PolicyRow, **changed: Any) -> EvaluationReport:
    """Return a report whose policy is `priced`."""
    fields: dict[str, Any] = {
        "bundle": "bundle",
        "setup": SETUP,
        "gates": True,
        "seed": 0,
        "sequences": 2,
        "seq_len": 34,
        "rows": rows,
        "at_no_more_bytes": (),
        "dominating": (),
        "skipped": {},
        "sparsity": 0.0,
        "whole_bytes_per_token": 0.0,
        "seconds": 1.0,
        "peak_rss_bytes": 2**30,
    }
    return EvaluationReport(**(fields | changed))


def harness_report(**changed: Any) -> HarnessReport:
    """Return what tasks took: 20 prompt tokens and 5 decoded ones, 2 slots dropped."""
    fields: dict[str, Any] = {
        "bundle": "bundle",
        "rows": (),
        "setup": SETUP,
        "lossy": True,
        "decode_context": False,
        "limit": None,
        "lm_eval_version": "0",
        "cut_contexts": 3,
        "prompt": PhaseCounters(tokens=20),
        "decode": PhaseCounters(tokens=5, drops=2),
        "seconds": 2.0,
        "peak_rss_bytes": 2**30,
    }
    return HarnessReport(**(fields | changed))


def layer_coverage(**changed: Any) -> LayerCoverage:
    """Return a layer of eight experts in which two answer 40 % of the uses."""
    fields: dict[str, Any] = {
        "layer": 3, "n_experts": 8, "n_hot": 2, "n_tokens": 90, "n_tokens_held_out": 30,
        "load_skew": 1.5, "entropy": 0.875, "never_used": 1, "locality": 0.25,
        "locality_by_chance": 0.125, "coverage": 0.4, "coverage_held_out": None,
        "coverage_held_out_best": None, "domain_coverage": (0.5, 0.25),
        "domain_coverage_held_out": (None, 0.125), "domain_distance": 0.5, "pin": "unknown",
    }  # fmt: skip
    return LayerCoverage(**(fields | changed))
