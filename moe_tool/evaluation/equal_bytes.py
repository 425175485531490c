"""Comparison of policies with `priced` at equal bytes read per token."""

from collections.abc import Mapping

from moe_tool.artifacts.evaluation_report import AtNoMoreBytes, Figures, PolicyRow, Verdict
from moe_tool.policies.misses import PRICED_POLICY, MissChoice, PriceBook

_NATS_PER_MB_FACTORS = (0.3, 0.1, 0.03, 0.01, 0.003)
"""Factors on the bundle's typical nats per MB, from few fetches to nearly all"""


def priced_settings(book: PriceBook | None) -> tuple[MissChoice, ...]:
    """Return `priced` at several values of `nats-per-mb`, by ascending bytes read."""
    if book is None:
        return ()
    typical = book.typical_nats_per_mb
    return tuple(
        PRICED_POLICY.with_value("nats-per-mb", float(f"{factor * typical:.4g}"))
        for factor in _NATS_PER_MB_FACTORS
    )


def compare_at_equal_bytes(rows: Mapping[MissChoice, PolicyRow]) -> tuple[AtNoMoreBytes, ...]:
    """Return the comparison for every lossy policy that is not `priced`.

    Args:
        rows: rows by policy, all under the same memory.
    """
    priced, others = _split(rows)
    found = []
    for name, row in others.items():
        affordable = [
            (other.bytes_read_per_token.value, -other.kl_mean.value, setting)
            for setting, other in priced.items()
            if other.bytes_read_per_token.value <= row.bytes_read_per_token.value
        ]
        if not affordable:
            continue
        best = max(affordable)[2]
        kl, theirs = row.kl_mean, priced[best].kl_mean
        verdict: Verdict = "within intervals"
        if theirs.high < kl.low:
            verdict = "beaten"
        elif theirs.low > kl.high:
            verdict = "beats priced"
        ratio = theirs.value / kl.value if kl.value > 0 else None
        found.append(AtNoMoreBytes(policy=name, priced=best, ratio=ratio, verdict=verdict))
    return tuple(found)


def dominating(rows: Mapping[MissChoice, PolicyRow]) -> tuple[tuple[str, str], ...]:
    """Return the (policy, setting of `priced`) pairs in which the policy has both fewer bytes and a
    lower KL, with disjoint intervals."""
    priced, others = _split(rows)
    return tuple(
        (name, setting)
        for name, row in others.items()
        for setting, other in priced.items()
        if row.kl_mean.high < other.kl_mean.low
        and row.bytes_read_per_token.high < other.bytes_read_per_token.low
    )


def _split(rows: Mapping[MissChoice, PolicyRow]) -> tuple[dict[str, Figures], dict[str, Figures]]:
    """Return the settings of `priced` and the other lossy policies, by name."""
    lossy = [(policy.spec.name, row) for policy, row in rows.items() if policy.spec.is_lossy]
    priced = {row.policy: row.figures for kind, row in lossy if kind == PRICED_POLICY.spec.name}
    return priced, {row.policy: row.figures for _, row in lossy if row.policy not in priced}
