"""Work of `buddies`: build, summarize and write a profile's buddy map."""

from pathlib import Path

import numpy as np

from moe_tool.artifacts.buddy_map import BuddyMap, LayerBuddies, Similarity
from moe_tool.artifacts.buddy_summary import BuddyReport, BuddySummary, LayerBuddySummary
from moe_tool.artifacts.expert_statistics import ExpertStatistics
from moe_tool.buddies.build_buddy_map import DEFAULT_RULES, build_buddy_map
from moe_tool.buddies.list_rules import ListRules
from moe_tool.formats.claimed_artifact import require_unclaimed
from moe_tool.formats.json_artifact import write_json_artifact
from moe_tool.formats.profile_hdf5 import ProfileReader


def make_buddies(
    profile: Path,
    *,
    k: int,
    by: Similarity,
    out: Path,
    rules: ListRules = DEFAULT_RULES,
    may_replace: bool = True,
) -> BuddyReport:
    """Build the buddy map of a profile and write it to `out`.

    Raises:
        NotFoundError, CorruptArtifactError: the profile cannot be read.
        UsageError: k is not below the number of experts, the rules do not fit, or `out` is
            another model's map and `may_replace` is False.
    """
    with ProfileReader.open(profile) as reader:
        if not may_replace:
            require_unclaimed(out, reader.header.identity)
        buddy_map = build_buddy_map(reader, k=k, by=by, rules=rules)
        summary = summarize_buddies(reader, buddy_map)
    write_json_artifact(out, buddy_map)
    return BuddyReport(
        buddies=out, model=buddy_map.identity.name, profile=profile, k=k, by=by, summary=summary
    )


def summarize_buddies(profile: ProfileReader, buddy_map: BuddyMap) -> BuddySummary:
    """Return the prices of the first substitutes, in-sample and held-out, layer by layer."""
    rows = tuple(
        _layer_summary(layer, profile.statistics(layer.layer)) for layer in buddy_map.layers
    )
    return BuddySummary(
        layers=rows,
        price_in_sample=_mean([row.price_in_sample for row in rows]),
        price_held_out=_mean([row.price_held_out for row in rows]),
        price_best_held_out=_mean([row.price_best_held_out for row in rows]),
        price_drop=_mean([row.price_drop for row in rows]),
    )


def _layer_summary(layer: LayerBuddies, statistics: ExpertStatistics) -> LayerBuddySummary:
    with_one = [expert for expert, buddies in enumerate(layer.buddies) if buddies]
    first = [layer.buddies[expert][0] for expert in with_one]
    others = statistics.probe_held_out.eps_buddy.astype(np.float64)  # [E, E]
    np.fill_diagonal(others, np.inf)
    best = others.min(axis=1)
    return LayerBuddySummary(
        layer=layer.layer,
        price_in_sample=_mean([buddy.price for buddy in first]),
        price_held_out=_mean([buddy.price_held_out for buddy in first]),
        price_best_held_out=_mean([float(best[expert]) for expert in with_one]),
        price_drop=_mean([float(statistics.probe.eps_drop[expert]) for expert in with_one]),
        n_without=len(layer.buddies) - len(with_one),
        n_fell_back=int(statistics.probe.fell_back.sum()),
        n_sampled_held_out=statistics.probe_held_out.n_sampled,
    )


def _mean(prices: list[float]) -> float:
    return sum(prices) / len(prices) if prices else 1.0
