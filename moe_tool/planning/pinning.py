"""Check that the hottest experts of a profile are hot on held-out text too, before pinning them."""

from dataclasses import dataclass

import numpy as np

from moe_tool.artifacts.expert_statistics import ExpertStatistics
from moe_tool.policies.hot_set import hottest_first
from moe_tool.policies.pin_rule import judge_pins


@dataclass(frozen=True, slots=True, kw_only=True)
class PinCheck:
    """Coverage of a pinned set, in-sample and held-out."""

    n_pinned: int
    even: float
    """Coverage of a set of this size if all experts were used alike"""
    in_sample: float
    held_out: float | None
    """Coverage of the held-out uses; None without held-out tokens"""
    by_domain: tuple[float | None, ...]
    """Coverage of each domain's held-out uses; None for a domain without any"""

    @property
    def refusal(self) -> str | None:
        """Reason against pinning the set; None if there is none."""
        ruling = judge_pins(
            even=self.even,
            in_sample=self.in_sample,
            held_out=self.held_out,
            by_domain=self.by_domain,
        )
        if ruling.verdict == "pin":
            return None
        return f"the {self.n_pinned} hottest experts {ruling.reason}"


def rank_experts(statistics: dict[int, ExpertStatistics]) -> list[tuple[int, int]]:
    """Return (layer, expert), the most used in-sample first, as a bundle's heat ranks them."""
    loads = {}
    for layer, each in statistics.items():
        counts = each.in_sample
        share = np.minimum(counts.load / max(counts.n_tokens, 1), 1.0)
        loads[layer] = share.tolist()
    return hottest_first(loads)


def check_pins(
    statistics: dict[int, ExpertStatistics], ranked: list[tuple[int, int]], n_pinned: int
) -> PinCheck:
    """Return the coverage of the first `n_pinned` experts, at least 1, of `rank_experts`."""
    inside = outside = inside_all = outside_all = 0.0
    n_domains = len(next(iter(statistics.values())).held_out.domain_load)
    answered, uses = np.zeros(n_domains), np.zeros(n_domains)
    for layer, expert in ranked[:n_pinned]:
        each = statistics[layer]
        inside += float(each.in_sample.load[expert])
        outside += float(each.held_out.load[expert])
        answered += each.held_out.domain_load[:, expert]
    for each in statistics.values():
        inside_all += float(each.in_sample.load.sum())
        outside_all += float(each.held_out.load.sum())
        uses += each.held_out.domain_load.sum(axis=1)
    return PinCheck(
        n_pinned=n_pinned,
        even=n_pinned / len(ranked),
        in_sample=inside / inside_all if inside_all else 0.0,
        held_out=outside / outside_all if outside_all else None,
        by_domain=tuple(
            float(part / whole) if whole else None
            for part, whole in zip(answered, uses, strict=True)
        ),
    )
