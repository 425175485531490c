"""Rule on whether a hot set is worth pinning, for `profile` and `plan`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["pin", "do not pin", "nothing to pin", "unknown"]
MIN_GAIN = 0.05
"""Least coverage above that of even use at which a hot set is worth a pin"""
MIN_KEPT = 0.8
"""Least share of the gain over even use that a hot set has to keep on held-out tokens"""
MAX_DOMAIN_RATIO = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class PinRuling:
    """Verdict on one hot set."""

    verdict: Verdict
    reason: str
    """Reason against the set, in words that follow "the hottest experts"; empty for `pin`"""


def judge_pins(
    *, even: float, in_sample: float, held_out: float | None, by_domain: Sequence[float | None]
) -> PinRuling:
    """Return whether to pin a set.

    Args:
        even: coverage of a set of this size if all experts are used alike.
        in_sample: coverage of the in-sample uses.
        held_out: coverage of the held-out uses; None without held-out tokens.
        by_domain: coverage of each domain's held-out uses.
    """
    if held_out is None:
        return PinRuling(verdict="unknown", reason="have no held-out tokens to check them with")
    if in_sample - even < MIN_GAIN:
        return PinRuling(
            verdict="nothing to pin",
            reason=f"answer {in_sample:.0%} of the uses, any others {even:.0%}",
        )
    if held_out - even < MIN_KEPT * (in_sample - even):
        return _refused(
            f"answer {in_sample:.0%} of the uses in-sample, but {held_out:.0%} held-out, "
            f"any others {even:.0%}"
        )
    known = [share for share in by_domain if share is not None]
    if len(known) > 1:
        worst, best = min(known), max(known)
        if best > MAX_DOMAIN_RATIO * worst:
            times = f"{best / worst:.1f} times" if worst else "infinitely"
            return _refused(f"answer {times} as much of one domain as of another")
        if worst <= even:
            return _refused(f"answer {worst:.0%} of one domain, any others {even:.0%}")
    return PinRuling(verdict="pin", reason="")


def _refused(reason: str) -> PinRuling:
    return PinRuling(verdict="do not pin", reason=reason)
