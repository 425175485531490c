"""Facts of the JSON artifacts: bit prices, buddy maps, hardware profiles and plans."""

from pathlib import Path

from moe_tool.artifacts.bit_prices import BitPrices
from moe_tool.artifacts.buddy_map import BuddyMap
from moe_tool.artifacts.hardware_profile import HardwareProfile
from moe_tool.formats.json_artifact import read_json_artifact
from moe_tool.formats.policy_names import read_plan
from moe_tool.inspection.description import Description, model_facts

_MEASURED = {"disk", "memory", "experts", "lookup"}
_MEASURED |= {"layer_warm_s", "layer_cold_s", "layer_rested_s", "cold_bytes"}


def describe_bit_prices(path: Path) -> Description:
    """Describe a file of bit prices."""
    prices = read_json_artifact(path, BitPrices)
    facts: dict[str, object] = model_facts(prices.identity) | {
        "quantizer": prices.quantizer,
        "widths": list(prices.widths),
        "profile_sha256": prices.profile_sha256,
        "tool_version": prices.tool_version,
    }
    return Description(
        kind="file of bit prices",
        path=path,
        checked="every field",
        facts=facts,
        tabled=prices,
        details=prices.model_dump(mode="json", include={"layers"}),
    )


def describe_hardware(path: Path) -> Description:
    """Describe a hardware profile."""
    profile = read_json_artifact(path, HardwareProfile)
    facts: dict[str, object] = {
        "name": profile.name,
        "source": profile.source,
        "cores": profile.cores,
        "ram_bytes": profile.ram_bytes,
        "kernels": profile.kernels,
        "gpu": None if profile.gpu is None else profile.gpu.name,
        "tool_version": profile.tool_version,
    }
    return Description(
        kind="hardware profile",
        path=path,
        checked="every field",
        facts=facts,
        tabled=profile,
        details=profile.model_dump(mode="json", include=_MEASURED),
    )


def describe_plan(path: Path) -> Description:
    """Describe a plan."""
    plan = read_plan(path)
    found = plan.prediction
    facts: dict[str, object] = model_facts(plan.identity) | {
        "memory_bytes": plan.memory_bytes,
        "context": plan.context,
        "bits": plan.bits,
        "skeleton_bits": plan.skeleton_bits,
        "eviction": plan.eviction,
        "prefetch": plan.prefetch,
        "policy": plan.policy or "exact",
        "replicas": plan.replicas or "none",
        "expected_kl": found.kl,
        "expert_slots": found.expert_slots,
        "predicted": f"{found.tokens_per_second:.2f} tokens/s (+-{found.error:.0%}), "
        f"{found.hit_rate:.1%} hits",
        "hardware": plan.hardware,
        "profile_sha256": plan.profile_sha256,
        "tool_version": plan.tool_version,
    }
    return Description(
        kind="plan",
        path=path,
        checked="every field",
        facts=facts,
        tabled=plan,
        details=plan.model_dump(mode="json", include={"prediction", "lines", "forms"}),
    )


def describe_buddies(path: Path) -> Description:
    """Describe a buddy map."""
    buddy_map = read_json_artifact(path, BuddyMap)
    facts: dict[str, object] = model_facts(buddy_map.identity) | {
        "by": buddy_map.by,
        "k": buddy_map.k,
        "layers": len(buddy_map.layers),
        "experts": len(buddy_map.layers[0].buddies) if buddy_map.layers else 0,
        "profile_sha256": buddy_map.profile_sha256,
        "tool_version": buddy_map.tool_version,
    }
    return Description(kind="buddy map", path=path, checked="every field", facts=facts)
