"""Facts of the JSON artifacts: bit prices, buddy maps, hardware profiles and plans."""

from pathlib import Path

from moe_tool.artifacts.bit_prices import BitPrices
from moe_tool.artifacts.buddy_map import BuddyMap
from moe_tool.artifacts.hardware_profile import HardwareProfile
from moe_tool.artifacts.pack_plan import PackPlan
from moe_tool.formats.json_artifact import read_json_artifact
from moe_tool.formats.policy_names import read_plan
from moe_tool.inspection.description import Description, model_facts, named_facts, residents_by

_MADE_FROM = ("profile_sha256", "tool_version")


def describe_bit_prices(path: Path) -> Description:
    """Describe a file of bit prices."""
    prices = read_json_artifact(path, BitPrices)
    facts = model_facts(prices.identity) | named_facts(prices, "quantizer", "widths", *_MADE_FROM)
    return _tabled("file of bit prices", path, prices, facts, {"layers"})


def describe_hardware(path: Path) -> Description:
    """Describe a hardware profile."""
    profile = read_json_artifact(path, HardwareProfile)
    facts = named_facts(profile, "name", "source", "cores", "ram_bytes", "kernels")
    facts["gpu"] = None if profile.gpu is None else profile.gpu.name
    facts["tool_version"] = profile.tool_version
    measured = {"disk", "memory", "experts", "lookup"}
    measured |= {"layer_warm_s", "layer_cold_s", "layer_rested_s", "cold_bytes"}
    return _tabled("hardware profile", path, profile, facts, measured)


def describe_plan(path: Path) -> Description:
    """Describe a plan."""
    plan = read_plan(path)
    found = plan.prediction
    chosen = ("memory_bytes", "context", "bits", "skeleton_bits", "eviction", "prefetch")
    facts = model_facts(plan.identity) | named_facts(plan, *chosen)
    facts |= {
        "policy": plan.policy or "exact",
        "replicas": plan.replicas or "none",
        "expected_kl": found.kl,
        "expert_slots": found.expert_slots,
        "predicted": f"{found.tokens_per_second:.2f} tokens/s (+-{found.error:.0%}), "
        f"{found.hit_rate:.1%} hits",
    }
    if plan.policy is not None and plan.residency is None:
        facts["residents"] = residents_by(plan.robust)
    facts |= named_facts(plan, "hardware", *_MADE_FROM)
    return _tabled("plan", path, plan, facts, {"prediction", "lines", "forms"})


def describe_buddies(path: Path) -> Description:
    """Describe a buddy map."""
    buddy_map = read_json_artifact(path, BuddyMap)
    facts = model_facts(buddy_map.identity) | named_facts(buddy_map, "by", "k")
    rules = buddy_map.rules
    if rules is not None:
        facts["scale"] = rules.scale
        if buddy_map.by == "coactivation":
            facts |= named_facts(rules, "alpha", "weighted", "smoothing", "warm_up")
            facts["warm_up_weight"] = rules.warm_up_weight
            by_layer = ", ".join(f"{layer}={alpha:g}" for layer, alpha in rules.alpha_by_layer)
            facts["alpha_by_layer"] = by_layer or "none"
    facts["layers"] = len(buddy_map.layers)
    facts["experts"] = len(buddy_map.layers[0].buddies) if buddy_map.layers else 0
    facts |= named_facts(buddy_map, *_MADE_FROM)
    return Description(kind="buddy map", path=path, checked="every field", facts=facts)


def _tabled(
    kind: str,
    path: Path,
    artifact: BitPrices | HardwareProfile | PackPlan,
    facts: dict[str, object],
    details: set[str],
) -> Description:
    return Description(
        kind=kind,
        path=path,
        checked="every field",
        facts=facts,
        tabled=artifact,
        details=artifact.model_dump(mode="json", include=details),
    )
