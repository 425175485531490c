"""A miss policy by name, made from what a bundle knows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.artifacts.precision import describe_precision
from moe_tool.errors import UsageError
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.moe_layers import MoeLayerModules
from moe_tool.models.router_rule import RouterRule, router_rule, weights_of_sets
from moe_tool.policies.misses import (
    Gates,
    MissChoice,
    MissPolicy,
    PolicyInputs,
    PriceBook,
    Reweigh,
)
from moe_tool.runtime.mask_scores import MaskTensors, mask_tensors
from moe_tool.runtime.price_list import price_book

_WITH_ABSENT = ("exact", "priced", "prune")
"""Policies of a bundle that leaves experts out: the others look for every expert that is wanted"""


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
    choice: MissChoice,
    manifest: BundleManifest,
    layers: Sequence[MoeLayerModules],
    config: PreTrainedConfig,
    *,
    gates: bool,
    seed: int,
) -> ChosenPolicy:
    """Return a policy made from what a bundle knows; a mask router that it asks is not read yet.

    Args:
        choice: the policy and its parameters.
        manifest: of the bundle; its stand-ins, thresholds and prices are used.
        layers: every MoE layer; its router's rule is used, its tensors need not be loaded.
        config: of the model.
        gates: whether lossy policies keep BuddyMoE's gates.
        seed: of policies that draw.

    Raises:
        UsageError: the bundle lacks what the policy needs.
        NotFoundError, UnsupportedModelError: as `MissChoice.make`.
    """
    if manifest.absent and choice.kind not in _WITH_ABSENT:
        raise UsageError(
            f"--policy {choice.kind}: the bundle leaves {len(manifest.absent)} experts out, and "
            f"its policy may be {', '.join(_WITH_ABSENT)}",
            hint="--policy priced",
        )
    buddies = None if manifest.buddies is None else manifest.buddies.layers
    thresholds: Gates | None = None
    if not gates:
        thresholds = Gates(entropy_threshold={}, enabled=False)
    elif buddies is not None:
        thresholds = Gates(
            entropy_threshold={entry.layer: entry.entropy_threshold for entry in buddies}
        )
    rules = _rules(layers, config)
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
        levels=tuple(
            describe_precision(each)
            for each in (manifest.precision, *(table.precision for table in manifest.replicas))
        ),
    )
    return ChosenPolicy(choice=choice, policy=choice.make(inputs), rules=rules or {}, prices=prices)


def with_masks(policy: ChosenPolicy, bundle: BundleReader) -> ChosenPolicy:
    """Return the policy with the bundle's mask routers read, where it asks them.

    Raises:
        CorruptArtifactError, StorageError: as `read_mask_router`.
    """
    if not policy.choice.asks_router:
        return policy
    return replace(policy, masks=mask_tensors(bundle.mask_router() or {}))


def _rules(
    layers: Sequence[MoeLayerModules], config: PreTrainedConfig
) -> dict[int, RouterRule] | None:
    """Return the routers' rules by layer; None where they are not known."""
    rules = {}
    for modules in layers:
        rule = router_rule(modules, config)
        if rule is None:
            return None
        rules[modules.layer] = rule
    return rules


def _reweigh(rule: RouterRule) -> Reweigh:
    def reweigh(logits: np.ndarray, index: np.ndarray) -> Any:
        wide = torch.from_numpy(logits).to(torch.float32)  # [T, E]
        return weights_of_sets(rule, wide, torch.from_numpy(index)).to(torch.float32).numpy()

    return reweigh
