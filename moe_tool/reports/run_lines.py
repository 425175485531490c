"""One-line summaries of the costs of a run or of tasks."""

from collections.abc import Sequence

from moe_tool.artifacts.evaluation_report import HarnessReport
from moe_tool.artifacts.run_result import AnswerQuality, RunResult
from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.budget.sizes import format_bytes


def run_line(result: RunResult) -> str:
    """Return tokens, rates, reads and changed answers of a continued prompt."""
    counters, quality = result.decode, result.quality
    parts = [
        f"{result.prompt.tokens} + {result.generated_tokens} tokens"
        + (", where the context ends" if result.stop_reason == "context" else ""),
        f"first after {result.seconds_to_first_token:.2f} s",
        f"{result.tokens_per_second:.1f} tokens/s",
        *_reads(counters),
    ]
    if counters.prefetches:
        used = f"{counters.prefetch_hits} used, {format_bytes(counters.prefetched_bytes)}"
        parts.append(f"{counters.prefetches} prefetches ({used})")
    if result.setup.table_bytes_on_disk:
        parts.append(f"{format_bytes(result.row_bytes_read)} of table rows read")
    if result.setup.sparse_experts is not None:
        parts.append(_sparsity(counters))
    if result.setup.activations == "int8":
        parts.append("int8 activations")
    parts += _changes(counters)
    if result.prompt.changed_answers:
        parts.append(_prompt_changes(result.prompt, quality))
    if quality.expected_kl:
        parts += _quality(quality)
    if result.drift is not None and result.drift.alarms:
        parts.append(
            f"{result.drift.alarms} of {result.drift.windows} windows of "
            f"{result.drift.window_tokens} tokens routed unlike the profile's"
        )
    return " · ".join([*parts, _peak(result)])


def harness_line(report: HarnessReport) -> str:
    """Return tokens, reads and changed answers of all requests of the tasks."""
    parts = [f"{report.prompt.tokens} + {report.decode.tokens} tokens"]
    if report.cut_contexts:
        parts.append(f"{report.cut_contexts} contexts cut at the beginning")
    parts += [f"{report.seconds:.1f} s", *_reads(report.decode), *_changes(report.decode)]
    return " · ".join([*parts, _peak(report)])


def _reads(counters: PhaseCounters) -> Sequence[str]:
    return (
        f"hit rate {counters.hit_rate:.1%}",
        f"{format_bytes(counters.bytes_read_per_token)} read per token",
        f"stalled {counters.stall_seconds:.2f} s",
        f"{counters.substitutions} substitutions",
    )


def _changes(counters: PhaseCounters) -> list[str]:
    parts = []
    if counters.replica_answers:
        parts.append(f"{counters.replica_answers} by replicas")
    if counters.drops:
        skipped = format_bytes(counters.skipped_fetch_bytes_per_token)
        parts.append(f"{counters.drops} drops ({skipped} per token not read for them)")
    return parts


def _sparsity(counters: PhaseCounters) -> str:
    whole = counters.whole_bytes
    read = "" if not whole else f", {counters.bytes_read / whole:.0%} of whole misses read"
    return f"{counters.sparsity:.1%} of channels skipped{read}"


def _prompt_changes(counters: PhaseCounters, quality: AnswerQuality) -> str:
    """Return the changed answers of a lossy prefill."""
    text = (
        f"in the prompt {counters.substitutions} substitutions, {counters.replica_answers} by "
        f"replicas, {counters.drops} drops"
    )
    if quality.prompt_expected_kl is not None:
        text += f", expected KL {quality.prompt_expected_kl:.4f} per token"
    return text


def _quality(quality: AnswerQuality) -> list[str]:
    """Return the expected KL, beside the measured one."""
    limit = quality.expected_kl_limit
    within = "" if limit is None else f" of {limit:g}"
    parts = [f"expected KL {quality.expected_kl:.4f} per token{within}"]
    if quality.exact_fallback_tokens:
        parts.append(f"{quality.exact_fallback_tokens} tokens answered exactly to keep it")
    if quality.shadow_kl is not None:
        parts.append(
            f"measured {quality.shadow_kl:.4f} a step on {quality.shadow_tokens} of them, where "
            f"{quality.shadow_expected_kl or 0.0:.4f} was expected ({quality.shadow_seconds:.1f} s)"
        )
    if quality.price_factor is not None and quality.shadow_tokens:
        parts.append(f"prices taken {quality.price_factor:.2f} times")
    return [", ".join(parts)]


def _peak(result: RunResult | HarnessReport) -> str:
    peak, budget = result.peak_rss_bytes, result.setup.memory_budget_bytes
    return f"peak memory {format_bytes(peak)} of {format_bytes(budget)}"
