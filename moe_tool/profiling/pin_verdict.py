"""Whether a layer's hot set is worth a place in memory."""

from moe_tool.profiling.coverage import LayerCoverage

MIN_GAIN = 0.05
"""A hot set that answers less than this above what even use would give is not worth a pin."""
MIN_KEPT = 0.8
"""A hot set holds up where this share of its gain over even use is there on held-out tokens."""


def pin_verdict(coverage: LayerCoverage) -> str:
    """Return in one line whether the in-sample hot set is worth pinning, with its figures."""
    even = coverage.coverage_by_chance
    held_out = coverage.coverage_held_out
    if held_out is None:
        return f"unknown: {coverage.coverage:.1%} in-sample, nothing held out"
    gain, kept = coverage.coverage - even, held_out - even
    if gain < MIN_GAIN:
        verdict = "nothing to pin"
    elif kept >= MIN_KEPT * gain:
        verdict = "pin"
    else:
        verdict = "do not pin"
    return (
        f"{verdict}: hottest {coverage.n_hot} of {coverage.n_experts} answer {held_out:.1%} "
        f"held-out, {coverage.coverage:.1%} in-sample, {even:.1%} if even"
    )
