"""Miss policy of a run, made by name from a bundle's data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedConfig

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.artifacts.routing import PRIMARY
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.models.moe_layers import MoeLayerModules
from moe_tool.models.router_rule import RouterRule, router_rule, weights_of_sets
from moe_tool.policies.misses import Gates, MissChoice, MissPolicy, PolicyInputs, PriceBook
from moe_tool.policies.misses.needs import MASK_ROUTER
from moe_tool.runtime.mask_scores import MaskTensors, mask_tensors
from moe_tool.runtime.memory_residency import Residency
from moe_tool.runtime.price_list import price_book, record_sizes
from moe_tool.runtime.run_options import RunOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenPolicy:
    """A miss policy with the data that the runtime needs for it."""

    choice: MissChoice
    policy: MissPolicy
    is_lossy: bool
    prices: PriceBook | None
    """Prices of the bundle's answers; None if it was packed without a profile"""
    rules: Mapping[int, RouterRule]
    """Decoder layer -> router rule; empty if the rule is unknown"""
    masks: Mapping[int, MaskTensors] = field(default_factory=dict)
    """Decoder layer -> mask router; empty if the policy uses none"""

    @property
    def name(self) -> str:
        """Name and parameters as `--policy` takes them."""
        return self.choice.name


def choose_policy(
    choice: MissChoice,
    manifest: BundleManifest,
    layers: Sequence[MoeLayerModules],
    config: PreTrainedConfig,
    *,
    residency: Residency,
    options: RunOptions,
) -> ChosenPolicy:
    """Return a policy made from a bundle's data; its mask routers are not read yet.

    Args:
        choice: the policy and its parameters.
        manifest: stand-ins, thresholds and prices of the bundle are used.
        layers: every MoE layer; router rules are used, tensors need not be loaded.
        config: configuration of the model.
        residency: under cache residency `priced` keeps primary forms alone.
        options: gates and seed are used.

    Raises:
        UsageError: the bundle lacks what the policy needs.
        NotFoundError, UnsupportedModelError: as `MissChoice.make`.
    """
    found = {modules.layer: router_rule(modules, config) for modules in layers}
    rules = {layer: rule for layer, rule in found.items() if rule is not None}
    if len(rules) < len(found):
        rules = {}
    known = manifest_inputs(manifest)
    scores_are_logits = not any(rule.scores_differ for rule in rules.values())
    prices = known.prices
    if prices is not None:
        prices = replace(prices, scores_are_logits=scores_are_logits)
        if residency == "cache" and choice.spec.residents == "cheapest":
            prices = prices.without_cheaper()
    inputs = replace(
        known,
        prices=prices,
        gates=known.gates if options.gates else Gates(entropy_threshold={}, enabled=False),
        reweigh={layer: partial(_reweigh, rule) for layer, rule in rules.items()} or None,
        scores_are_logits=scores_are_logits,
        seed=options.seed,
    )
    return ChosenPolicy(
        choice=choice,
        policy=choice.make(inputs),
        is_lossy=choice.spec.is_lossy,
        prices=inputs.prices,
        rules=rules,
    )


def manifest_inputs(manifest: BundleManifest) -> PolicyInputs:
    """Return the inputs of policies that are known without the model."""
    buddies = None if manifest.buddies is None else manifest.buddies.layers
    sizes = record_sizes(manifest)
    entries = manifest.prices or ()
    return PolicyInputs(
        gates=None
        if buddies is None
        else Gates(
            entropy_threshold={entry.layer: entry.entropy_threshold for entry in buddies},
            entropy_quantiles={entry.layer: entry.entropy_quantiles for entry in buddies},
            expert_bytes=_mean_size(sizes),
        ),
        buddies=buddies,
        buddies_by=None if manifest.buddies is None else manifest.buddies.by,
        prices=price_book(manifest),
        unimportance={entry.layer: np.array(entry.unimportance) for entry in entries},
        ratios={entry.layer: np.array(entry.ratio) for entry in entries},
        pruning=manifest.pruning,
        top_k=manifest.shape.top_k,
        forms=(manifest.bits, *(table.name for table in manifest.cheaper)),
        stored={layer: size > 0 for layer, size in sizes.items()},
    )


def _mean_size(sizes: Mapping[int, np.ndarray]) -> float:
    """Return the mean size of the primary records in bytes, from [F, E] sizes by layer."""
    primary = np.concatenate([size[PRIMARY] for size in sizes.values()])
    return float(primary.sum() / max(1, np.count_nonzero(primary)))


def with_masks(policy: ChosenPolicy, bundle: BundleReader) -> ChosenPolicy:
    """Return the policy with the bundle's mask routers read, if it uses them.

    Raises:
        CorruptArtifactError, StorageError: as `read_mask_router`.
    """
    if MASK_ROUTER not in policy.choice.spec.needs:
        return policy
    return replace(policy, masks=mask_tensors(bundle.mask_router() or {}))


def _reweigh(
    rule: RouterRule, logits: np.ndarray, index: np.ndarray, present: np.ndarray
) -> np.ndarray:
    """Return the gate weights of sets of experts by a layer's rule; see `Reweigh`."""
    wide = torch.from_numpy(logits).to(torch.float32)  # [T, E]
    weights = weights_of_sets(rule, wide, torch.from_numpy(index), torch.from_numpy(present))
    found: np.ndarray = weights.to(torch.float32).numpy()
    return found
