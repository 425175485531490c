"""Policies at equal bytes per token: each beside what answering by price costs that reads no
more."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moe_tool.evaluation.figures import Figures, Interval
from moe_tool.policies.misses import PriceBook, parse_miss_policy

_NATS_PER_MB_FACTORS = (0.3, 0.1, 0.03, 0.01, 0.003)
"""Times the typical price of a megabyte: between them nothing to nearly everything is read"""
_BASELINE = "priced"
Verdict = Literal["beaten", "within intervals", "beats priced"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AtNoMoreBytes:
    """One policy beside the measured setting of `priced` that reads most without reading more."""

    policy: str
    bytes_read_per_token: float
    kl: float
    kl_ci95: Interval
    priced: str
    priced_bytes_read_per_token: float
    priced_kl: float
    priced_kl_ci95: Interval
    verdict: Verdict

    @property
    def ratio(self) -> float | None:
        """KL of `priced` over the policy's; None where that is 0."""
        return self.priced_kl / self.kl if self.kl > 0 else None


def priced_settings(book: PriceBook | None) -> tuple[str, ...]:
    """Return `priced` at several values of `nats-per-mb`, the one that reads most last."""
    if book is None:
        return ()
    choice = parse_miss_policy(_BASELINE)
    typical = book.typical_nats_per_mb
    return tuple(
        choice.with_value("nats-per-mb", float(f"{factor * typical:.4g}")).name
        for factor in _NATS_PER_MB_FACTORS
    )


def compare_at_equal_bytes(rows: Mapping[str, Figures]) -> tuple[AtNoMoreBytes, ...]:
    """Return the comparison for every lossy policy that is not `priced`.

    Args:
        rows: policy -> its figures, all under the same memory.
    """
    priced, others = _split(rows)
    found = []
    for name, row in others.items():
        affordable = [
            (other.bytes_read_per_token, -other.kl_mean, setting)
            for setting, other in priced.items()
            if other.bytes_read_per_token <= row.bytes_read_per_token
        ]
        if affordable:
            best = max(affordable)[2]
            found.append(_beside(name, row, best, priced[best]))
    return tuple(found)


def dominating(rows: Mapping[str, Figures]) -> tuple[tuple[str, str], ...]:
    """Return the (policy, setting of `priced`) pairs in which the policy has both fewer bytes and a
    lower KL, beyond the intervals."""
    priced, others = _split(rows)
    return tuple(
        (name, setting)
        for name, row in others.items()
        for setting, other in priced.items()
        if _high(row.kl_mean, row.kl_mean_ci95) < _low(other.kl_mean, other.kl_mean_ci95)
        and _high(row.bytes_read_per_token, row.bytes_read_per_token_ci95)
        < _low(other.bytes_read_per_token, other.bytes_read_per_token_ci95)
    )


def _beside(name: str, row: Figures, setting: str, priced: Figures) -> AtNoMoreBytes:
    verdict: Verdict = "within intervals"
    if _high(priced.kl_mean, priced.kl_mean_ci95) < _low(row.kl_mean, row.kl_mean_ci95):
        verdict = "beaten"
    elif _low(priced.kl_mean, priced.kl_mean_ci95) > _high(row.kl_mean, row.kl_mean_ci95):
        verdict = "beats priced"
    return AtNoMoreBytes(
        policy=name,
        bytes_read_per_token=row.bytes_read_per_token,
        kl=row.kl_mean,
        kl_ci95=row.kl_mean_ci95,
        priced=setting,
        priced_bytes_read_per_token=priced.bytes_read_per_token,
        priced_kl=priced.kl_mean,
        priced_kl_ci95=priced.kl_mean_ci95,
        verdict=verdict,
    )


def _split(rows: Mapping[str, Figures]) -> tuple[dict[str, Figures], dict[str, Figures]]:
    """Return the settings of `priced`, and the other lossy policies."""
    kinds = {name: parse_miss_policy(name).spec for name in rows}
    priced = {name: row for name, row in rows.items() if kinds[name].name == _BASELINE}
    others = {name: rows[name] for name, spec in kinds.items() if spec.is_lossy}
    return priced, {name: row for name, row in others.items() if name not in priced}


def _low(value: float, interval: Interval) -> float:
    return value if interval is None else interval[0]


def _high(value: float, interval: Interval) -> float:
    return value if interval is None else interval[1]
