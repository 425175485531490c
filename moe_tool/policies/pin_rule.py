"""Whether a set of hot experts is worth a place in memory for good: one rule for `profile` and
`plan`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["pin", "do not pin", "nothing to pin", "unknown"]
MIN_GAIN = 0.05
"""A hot set that answers less than this above what even use would give is not worth a pin."""
MIN_KEPT = 0.8
"""A hot set holds up where this share of its gain over even use is there on held-out tokens."""
MAX_DOMAIN_RATIO = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class PinRuling:
    """The verdict on one set."""

    verdict: Verdict
    reason: str
    """Reason against the set, in words that follow "the hottest experts"; empty for `pin`"""


def judge_pins(
    *, even: float, in_sample: float, held_out: float | None, by_domain: Sequence[float | None]
) -> PinRuling:
    """Return whether to pin a set.

    Args:
        even: share of the uses that a set of this size answers if all experts are used alike.
        in_sample: share that it answers of the tokens that chose it.
        held_out: share of others; None where there are none.
        by_domain: the same of each domain.
    """
    if held_out is None:
        return PinRuling(verdict="unknown", reason="have nothing held out to check them with")
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
