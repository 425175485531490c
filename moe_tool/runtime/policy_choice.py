"""A miss policy by name, made from what a bundle knows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.errors import UsageError
from moe_tool.models.router_rule import RouterRule, router_rule
from moe_tool.models.skeleton import Skeleton
from moe_tool.policies.misses import MISS_POLICIES, Gates, MissPolicy, PolicyInputs, Reweigh

EXACT = "exact"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenPolicy:
    """A miss policy, and what the runtime needs to serve it."""

    name: str
    policy: MissPolicy
    rules: Mapping[int, RouterRule]
    """By decoder layer; empty where the policy looks at no selection scores"""


def choose_policy(
    name: str, manifest: BundleManifest, skeleton: Skeleton, *, gates: bool, seed: int
) -> ChosenPolicy:
    """Return the policy that `--policy` names.

    Args:
        name: a key of MISS_POLICIES.
        manifest: of the bundle; its stand-ins and thresholds are used.
        skeleton: the loaded model; its routers' rules are used.
        gates: whether lossy policies keep BuddyMoE's gates.
        seed: of policies that draw.

    Raises:
        UsageError: the name is unknown, or the bundle lacks what the policy needs.
    """
    require_policy(name)
    buddies = None if manifest.buddies is None else manifest.buddies.layers
    thresholds: Gates | None = None
    if not gates:
        thresholds = Gates(entropy_threshold={}, enabled=False)
    elif buddies is not None:
        thresholds = Gates(
            entropy_threshold={entry.layer: entry.entropy_threshold for entry in buddies}
        )
    rules = _rules(skeleton)
    inputs = PolicyInputs(
        gates=thresholds,
        buddies=buddies,
        reweigh=None if rules is None else {layer: _reweigh(rule) for layer, rule in rules.items()},
        seed=seed,
    )
    policy = MISS_POLICIES[name](inputs)
    return ChosenPolicy(name=name, policy=policy, rules=rules or {})


def require_policy(name: str) -> None:
    """Refuse a name that is not in the table.

    Raises:
        UsageError: with the names that are.
    """
    if name not in MISS_POLICIES:
        raise UsageError(
            f"--policy {name} is not known", hint=f"use one of {', '.join(MISS_POLICIES)}"
        )


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
    def reweigh(logits: np.ndarray, index: np.ndarray) -> Any:
        wide = torch.from_numpy(logits).to(torch.float32)  # [T, E]
        return rule.weights(wide, torch.from_numpy(index)).to(torch.float32).numpy()

    return reweigh
