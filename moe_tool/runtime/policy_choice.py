"""A miss policy by name, made from what a bundle knows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.router_rule import RouterRule, router_rule, weights_of_sets
from moe_tool.models.skeleton import Skeleton
from moe_tool.policies.misses import (
    Gates,
    MissChoice,
    MissPolicy,
    PolicyInputs,
    PriceBook,
    Reweigh,
    parse_miss_policy,
)
from moe_tool.runtime.mask_scores import MaskTensors, mask_tensors
from moe_tool.runtime.price_list import price_book

EXACT = "exact"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenPolicy:
    """A miss policy, and what the runtime needs to serve it."""

    choice: MissChoice
    policy: MissPolicy
    prices: PriceBook | None
    """Of the bundle's answers; None where it was packed without a profile"""
    rules: Mapping[int, RouterRule]
    """By decoder layer; empty where the policy looks at no selection scores"""
    masks: Mapping[int, MaskTensors] = field(default_factory=dict)
    """By decoder layer; empty where the policy asks no mask router"""

    @property
    def name(self) -> str:
        """As `--policy` takes it."""
        return self.choice.name


def choose_policy(
    name: str, bundle: BundleReader, skeleton: Skeleton, *, gates: bool, seed: int
) -> ChosenPolicy:
    """Return the policy that `--policy` names.

    Args:
        name: what `parse_miss_policy` takes.
        bundle: its stand-ins, thresholds and trained routers are used.
        skeleton: the loaded model; its routers' rules are used.
        gates: whether lossy policies keep BuddyMoE's gates.
        seed: of policies that draw.

    Raises:
        UsageError: the name is unknown, or the bundle lacks what the policy needs.
        NotFoundError, UnsupportedModelError: as `MissChoice.make`.
        CorruptArtifactError, StorageError: as `read_mask_router`.
    """
    choice = parse_miss_policy(name)
    manifest = bundle.manifest
    buddies = None if manifest.buddies is None else manifest.buddies.layers
    thresholds: Gates | None = None
    if not gates:
        thresholds = Gates(entropy_threshold={}, enabled=False)
    elif buddies is not None:
        thresholds = Gates(
            entropy_threshold={entry.layer: entry.entropy_threshold for entry in buddies}
        )
    rules = _rules(skeleton)
    prices = price_book(manifest)
    entries = manifest.prices or ()
    inputs = PolicyInputs(
        gates=thresholds,
        buddies=buddies,
        reweigh=None if rules is None else {layer: _reweigh(rule) for layer, rule in rules.items()},
        seed=seed,
        scores_are_logits=rules is None or not any(r.scores_differ for r in rules.values()),
        prices=prices,
        unimportance={entry.layer: np.array(entry.unimportance) for entry in entries},
        pruning=manifest.pruning,
        top_k=manifest.shape.top_k,
        ratios={entry.layer: np.array(entry.ratio) for entry in entries},
        forms=tuple(
            each.name
            for each in (manifest.precision, *(table.precision for table in manifest.replicas))
        ),
    )
    policy = choice.make(inputs)
    router = bundle.mask_router() if choice.asks_router else None
    return ChosenPolicy(
        choice=choice,
        policy=policy,
        rules=rules or {},
        prices=prices,
        masks=mask_tensors(router or {}),
    )


def require_policy(name: str) -> None:
    """Refuse a policy that is not known.

    Raises:
        UsageError: with those that are.
    """
    parse_miss_policy(name)


def _rules(skeleton: Skeleton) -> dict[int, RouterRule] | None:
    """The routers' rules by layer; None where they are not known."""
    rules = {}
    for modules in skeleton.layers:
        rule = router_rule(modules, skeleton.model.config)
        if rule is None:
            return None
        rules[modules.layer] = rule
    return rules


def _reweigh(rule: RouterRule) -> Reweigh:
    def reweigh(logits: np.ndarray, index: np.ndarray, present: np.ndarray) -> Any:
        wide = torch.from_numpy(logits).to(torch.float32)  # [T, E]
        weights = weights_of_sets(rule, wide, torch.from_numpy(index), torch.from_numpy(present))
        return weights.to(torch.float32).numpy()

    return reweigh
