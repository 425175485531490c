"""Facts of a bundle: contents, precisions, and measured quality."""

from collections.abc import Mapping
from pathlib import Path

from moe_tool.artifacts.bundle_manifest import BundleManifest
from moe_tool.artifacts.bundle_sections import (
    RESIDENT_USE,
    ROUTING_NORM,
    ROW_TABLES,
    SOURCE_FILES,
    TUNED_FLOATS,
    QualityFigure,
)
from moe_tool.artifacts.routing_norm import WINDOW_TOKENS
from moe_tool.artifacts.row_tables import table_bytes
from moe_tool.budget.sizes import format_bytes
from moe_tool.budget.table_choice import parse_rows
from moe_tool.formats.bundle_reader import BundleReader
from moe_tool.formats.safetensors_index import TensorInfo
from moe_tool.inspection.description import Description, model_facts, residents_by, shape_facts
from moe_tool.progress import Progress


def describe_bundle(path: Path, *, verify: bool, progress: Progress) -> Description:
    """Describe a folder that `pack` wrote.

    Raises:
        CorruptArtifactError, ArtifactVersionError: it is damaged, or has another format version.
    """
    with BundleReader.open(path) as reader:
        if verify:
            reader.verify_all(progress)
        manifest = reader.manifest
        with reader.open_skeleton() as skeleton:
            tables = _table_facts(manifest, skeleton.tensors)
    sections = {name: each.model_dump(mode="json") for name, each in manifest.sections.items()}
    if SOURCE_FILES in sections:
        del sections[SOURCE_FILES]["body"]["tables"]  # as long as the list of records
    sections.pop(ROW_TABLES, None)  # as long as the tables; the facts tell the rest
    if RESIDENT_USE in sections:
        del sections[RESIDENT_USE]["body"]["layers"]  # two numbers per expert
    if ROUTING_NORM in sections:
        del sections[ROUTING_NORM]["body"]["layers"]  # thousands of numbers
    if TUNED_FLOATS in sections:
        del sections[TUNED_FLOATS]["body"]["tensors"]  # some per layer
    details = manifest.model_dump(mode="json", include={"calibration", "lineage"})
    return Description(
        kind="bundle",
        path=path,
        checked="every hash" if verify else "sizes and headers",
        facts=_facts(manifest) | tables,
        details={
            name: found for name, found in (details | {"sections": sections}).items() if found
        },
    )


def _facts(manifest: BundleManifest) -> dict[str, object]:
    sources = manifest.sources
    return (
        model_facts(manifest.identity)
        | shape_facts(manifest.shape)
        | {
            "bits": _primary_bits(manifest),
            "skeleton_bits": manifest.skeleton_precision.name,
            "bytes": sum(file.size_bytes for file in manifest.written_files),
            "record_bytes": manifest.primaries[0].record_size_bytes,
            "expert_bytes": manifest.primary_bytes,
            "experts_in": "the bundle" if sources is None else sources.resolved,
            "record_layout": manifest.record_layout,
            "profile_sha256": manifest.profile_sha256,
            "buddies_by": None if manifest.buddies is None else manifest.buddies.by,
            "replicas": ", ".join(each.name for each in manifest.cheaper) or "none",
            "tool_version": manifest.tool_version,
        }
        | _lineage_facts(manifest)
        | _float_facts(manifest)
        | _policy_facts(manifest)
        | _resident_facts(manifest)
        | _pruning_facts(manifest)
        | _norm_facts(manifest)
    )


def _primary_bits(manifest: BundleManifest) -> str:
    """Return the primary precision, or the number of experts by precision."""
    found = manifest.primary_counts
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(f"{bits}: {count}" for bits, count in sorted(found.items()))


def _lineage_facts(manifest: BundleManifest) -> dict[str, object]:
    if not manifest.lineage:
        return {}
    last = manifest.lineage[-1]
    return {
        "tuned": f"{last.steps} steps of {last.optimizer}, {last.rounding} rounding, "
        f"on {', '.join(last.sources)}",
        "tuned_from": last.parent_sha256,
    }


def _float_facts(manifest: BundleManifest) -> dict[str, object]:
    """Return what was kept of trained norms and routers, and what it is worth."""
    floats = manifest.tuned_floats
    if floats is None:
        return {}
    kinds = (("norms", floats.norms), ("routers", floats.router))
    return {
        "tuned_floats": ", ".join(
            f"{share:.0%} of the training of {name} kept"
            for name, share in kinds
            if share is not None
        ),
        "tuned_floats_measured": _measured(floats.best if floats.is_kept else floats.codes_alone),
        "tuned_floats_without": _measured(floats.codes_alone),
    }


def _policy_facts(manifest: BundleManifest) -> dict[str, object]:
    """Return the default policy and its measured or expected KL."""
    calibration, plan = manifest.calibration, manifest.plan
    if calibration is None:
        if plan is None or plan.policy is None:
            return {"policy": "exact"}
        return {"policy": plan.policy, "expected_kl": plan.prediction.kl}

    return {
        "policy": calibration.policy,
        "calibrated_to": f"KL {calibration.max_kl:g} with {calibration.expert_slots} expert slots",
        "calibrated_on": f"{calibration.domain_names} ({', '.join(calibration.sources)})",
        "measured": _measured(calibration.quality),
        **{f"measured_{domain}": _measured(each) for domain, each in calibration.domains.items()},
    }


def _resident_facts(manifest: BundleManifest) -> dict[str, object]:
    """Return what chooses the residents that answer misses."""
    if manifest.prices is None:
        return {}
    use = manifest.resident_use
    return {"residents": residents_by(0 if use is None else use.share)}


def _pruning_facts(manifest: BundleManifest) -> dict[str, object]:
    """Return the pruning rate of the trained mask routers and its measured KL."""
    pruning = manifest.pruning
    if pruning is None:
        return {}
    return {
        "pruning": f"trained to drop {pruning.rate:.0%} of the chosen experts",
        "pruning_measured": _measured(pruning.quality),
        "pruning_trained_on": ", ".join(pruning.sources),
    }


def _norm_facts(manifest: BundleManifest) -> dict[str, object]:
    """Return the domains that text is compared with, and the false alarms on held-out text."""
    norm = manifest.routing_norm
    if norm is None:
        return {}
    return {
        "routing_norm": ", ".join(norm.domains),
        "routing_norm_false_alarms": f"{norm.held_out_alarms} of {norm.held_out_windows} held-out "
        f"windows of {WINDOW_TOKENS} tokens",
    }


def _table_facts(manifest: BundleManifest, tensors: Mapping[str, TensorInfo]) -> dict[str, object]:
    """Return each embedding table of which rows can be read, and where a run has it by default."""
    section = manifest.row_tables
    if section is None:
        return {}
    request = parse_rows(section.rows)
    chosen = request.choose(table_bytes(section.parts))
    short = "on disk" if request.is_forced else "on disk where memory is short"
    facts: dict[str, object] = {}
    for part in section.parts:
        info = tensors[part.tensor]
        row_bytes = info.size_bytes // info.shape[0]
        facts[f"table {part.tensor}"] = (
            f"{info.shape[0]} rows of {row_bytes} bytes, {format_bytes(info.size_bytes)}, "
            f"{short if part.parameter in chosen else 'in memory'}"
        )
    return facts


def _measured(quality: QualityFigure) -> str:
    low, high = quality.kl_ci95
    return f"KL {quality.kl:.4f} [{low:.4f}, {high:.4f}] over {quality.tokens} tokens"
