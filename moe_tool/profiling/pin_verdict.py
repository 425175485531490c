"""Whether a layer's hot set is worth a place in memory."""

from moe_tool.policies.pin_rule import judge_pins
from moe_tool.profiling.coverage import LayerCoverage


def pin_verdict(coverage: LayerCoverage) -> str:
    """Return in one line whether the in-sample hot set is worth pinning, with its figures."""
    even, held_out = coverage.coverage_by_chance, coverage.coverage_held_out
    verdict = judge_pins(
        even=even,
        in_sample=coverage.coverage,
        held_out=held_out,
        by_domain=coverage.domain_coverage_held_out,
    ).verdict
    if held_out is None:
        return f"{verdict}: {coverage.coverage:.1%} in-sample, nothing held out"
    return (
        f"{verdict}: hottest {coverage.n_hot} of {coverage.n_experts} answer {held_out:.1%} "
        f"held-out, {coverage.coverage:.1%} in-sample, {even:.1%} if even"
    )
