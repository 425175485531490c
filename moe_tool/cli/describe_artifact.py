"""What a file or folder is, made from what: the facts that `inspect` shows."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moe_tool.artifact_folder import BUDDIES_SUFFIX, PROFILE_SUFFIX
from moe_tool.artifacts.buddy_map import BuddyMap
from moe_tool.artifacts.identity import ModelIdentity
from moe_tool.artifacts.moe_shape import MoeShape
from moe_tool.errors import CorruptArtifactError, NotFoundError
from moe_tool.progress import Progress

if TYPE_CHECKING:
    from rich.table import Table

    from moe_tool.artifacts.bundle_manifest import BundleManifest
    from moe_tool.artifacts.quality_figure import QualityFigure
    from moe_tool.artifacts.routing_report import RoutingReport
    from moe_tool.profiling.coverage import LayerCoverage

_PARTIAL_BUNDLE = ".part"
_PARTIAL_PROFILE = ".parts"
_LAYER_FIELDS = ("layer_warm_s", "layer_cold_s", "layer_rested_s", "cold_bytes")
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """One artifact, described."""

    kind: str
    path: Path
    is_intact: bool
    """False for what was never finished; what is damaged is not described but refused"""
    checked: str
    """What `is_intact` rests on"""
    facts: dict[str, object]
    """In the order in which they are shown"""
    coverage: tuple["LayerCoverage", ...] = ()
    """Of a profile, by layer"""
    tables: "tuple[Table, ...]" = ()
    """For people, below the facts"""
    details: dict[str, object] = field(default_factory=dict)
    """What the tables show, for `--json`"""
    routing: "RoutingReport | None" = None
    """Of a profile"""


def describe_artifact(path: Path, *, verify: bool, progress: Progress) -> Description:
    """Return what lies at `path`.

    Args:
        path: a profile, buddy map, plan, hardware profile, trace of a run, bundle, half-written
            bundle or checkpoint.
        verify: read everything and check every hash, not only headers and sizes.
        progress: told about the reading.

    Raises:
        NotFoundError: nothing is there.
        CorruptArtifactError: it is damaged, or nothing that this tool knows.
        ArtifactVersionError: it is of another version.
    """
    if not path.exists():
        raise NotFoundError(f"there is nothing at {path}", hint="ls profiles/ shows what there is")
    if path.is_dir():
        return _describe_folder(path, verify=verify, progress=progress)
    with path.open("rb") as file:
        is_hdf5 = file.read(len(_HDF5_MAGIC)) == _HDF5_MAGIC
    if is_hdf5:
        from moe_tool.formats.run_trace_hdf5 import is_run_trace

        if is_run_trace(path):
            return _describe_run_trace(path)
        return _describe_profile(path, progress)
    if path.name.endswith(PROFILE_SUFFIX):
        return _describe_profile(path, progress)
    if path.name == "manifest.json":
        return _describe_bundle(path.parent, verify=verify, progress=progress)
    if path.name.endswith((BUDDIES_SUFFIX, ".json")):
        return _describe_json(path)
    raise _unknown(path)


def _describe_folder(path: Path, *, verify: bool, progress: Progress) -> Description:
    if path.name.endswith(_PARTIAL_BUNDLE):
        return _unfinished(path, "half-written bundle", "the same moe-tool pack command")
    if path.name.endswith(_PARTIAL_PROFILE):
        return _unfinished(path, "half-written profile", "moe-tool profile ... --resume")
    if (path / "manifest.json").exists() or any(path.glob("experts-*.safetensors")):
        return _describe_bundle(path, verify=verify, progress=progress)
    if (path / "config.json").exists():
        return _describe_checkpoint(path)
    raise _unknown(path)


def _describe_profile(path: Path, progress: Progress) -> Description:
    """Its report reads every array, so there is nothing left to verify."""
    from moe_tool.formats.profile_hdf5 import ProfileReader
    from moe_tool.profiling.coverage import layer_coverages
    from moe_tool.profiling.routing_report import report_routing

    with ProfileReader.open(path) as reader:
        header, tokens = reader.header, reader.tokens
        coverage = layer_coverages(reader)
        routing = report_routing(reader, progress)
        facts = (
            _model_facts(header.identity)
            | _shape_facts(header.shape)
            | {
                "tokens": int(tokens.ids.size),
                "sequences": int(tokens.ids.shape[0]),
                "held_out_sequences": int(tokens.held_out.sum()),
                "domains": list(tokens.domains),
                "sources": list(header.sources),
                "seed": header.seed,
                "tokenizer_sha256": header.tokenizer_sha256,
                "tool_version": header.tool_version,
                "sha256": reader.sha256,
            }
        )
    return Description(
        kind="profile",
        path=path,
        is_intact=True,
        checked="every array",
        facts=facts,
        coverage=coverage,
        routing=routing,
    )


def _describe_json(path: Path) -> Description:
    from moe_tool.formats.json_artifact import json_artifact_kind

    describe = {
        "bit-prices": _describe_bit_prices,
        "buddies": _describe_buddies,
        "hardware": _describe_hardware,
        "plan": _describe_plan,
    }.get(json_artifact_kind(path) or "")
    if describe is not None:
        return describe(path)
    if path.name.endswith(BUDDIES_SUFFIX):
        return _describe_buddies(path)  # refuses it, with what a buddy map should be
    raise _unknown(path)


def _describe_bit_prices(path: Path) -> Description:
    from moe_tool.artifacts.bit_prices import BitPrices
    from moe_tool.formats.json_artifact import read_json_artifact
    from moe_tool.reports.plan_table import bit_prices_table

    prices = read_json_artifact(path, BitPrices)
    facts: dict[str, object] = _model_facts(prices.identity) | {
        "quantizer": prices.quantizer,
        "widths": list(prices.widths),
        "profile_sha256": prices.profile_sha256,
        "tool_version": prices.tool_version,
    }
    return Description(
        kind="file of bit prices",
        path=path,
        is_intact=True,
        checked="every field",
        facts=facts,
        tables=(bit_prices_table(prices),),
        details=prices.model_dump(mode="json", include={"layers"}),
    )


def _describe_hardware(path: Path) -> Description:
    from moe_tool.artifacts.hardware_profile import HardwareProfile
    from moe_tool.formats.json_artifact import read_json_artifact
    from moe_tool.reports.hardware_table import experts_table, lookup_table, speeds_table

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
        is_intact=True,
        checked="every field",
        facts=facts,
        tables=(
            speeds_table(profile),
            experts_table(profile),
            *([lookup_table(profile)] if profile.lookup else []),
        ),
        details=profile.model_dump(mode="json", include={"disk", "memory", "experts", "lookup"})
        | {name: getattr(profile, name) for name in _LAYER_FIELDS},
    )


def _describe_plan(path: Path) -> Description:
    from moe_tool.formats.policy_names import read_plan
    from moe_tool.reports.plan_table import forms_table, lines_table

    plan = read_plan(path)
    found = plan.prediction
    facts: dict[str, object] = _model_facts(plan.identity) | {
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
        is_intact=True,
        checked="every field",
        facts=facts,
        tables=(lines_table(plan.lines), *([forms_table(plan)] if plan.forms else [])),
        details=plan.model_dump(mode="json", include={"prediction", "lines", "forms"}),
    )


def _describe_run_trace(path: Path) -> Description:
    """Its reader checks every array against the others."""
    from moe_tool.formats.run_trace_hdf5 import read_run_trace

    header, calls = read_run_trace(path)
    facts: dict[str, object] = (
        _model_facts(header.identity)
        | _shape_facts(header.shape)
        | {
            "bits": header.precision.name,
            "skeleton_bits": header.skeleton_precision.name,
            "threads": header.threads,
            "expert_slots": header.n_slots,
            "pinned": len(header.pinned),
            "eviction": header.eviction,
            "prefetch": header.prefetch,
            "layer_calls": len(calls.layer),
            "router_scores": "recorded" if calls.scores is not None else "not recorded",
            "prompt_tokens": header.prompt_tokens,
            "decode_tokens": header.decode_tokens,
            "decode_seconds": round(header.decode_seconds, 3),
            "hits": header.hits,
            "misses": header.misses,
            "tool_version": header.tool_version,
        }
    )
    return Description(
        kind="trace of a run", path=path, is_intact=True, checked="every array", facts=facts
    )


def _describe_buddies(path: Path) -> Description:
    from moe_tool.formats.json_artifact import read_json_artifact

    buddy_map = read_json_artifact(path, BuddyMap)
    facts: dict[str, object] = _model_facts(buddy_map.identity) | {
        "by": buddy_map.by,
        "k": buddy_map.k,
        "layers": len(buddy_map.layers),
        "experts": len(buddy_map.layers[0].buddies) if buddy_map.layers else 0,
        "profile_sha256": buddy_map.profile_sha256,
        "tool_version": buddy_map.tool_version,
    }
    return Description(
        kind="buddy map", path=path, is_intact=True, checked="every field", facts=facts
    )


def _describe_bundle(path: Path, *, verify: bool, progress: Progress) -> Description:
    from moe_tool.formats.bundle_reader import BundleReader

    with BundleReader.open(path) as reader:
        if verify:
            reader.verify_all(progress)
        manifest = reader.manifest
    facts: dict[str, object] = (
        _model_facts(manifest.identity)
        | _shape_facts(manifest.shape)
        | {
            "bits": _own_bits(manifest),
            "skeleton_bits": manifest.skeleton_precision.name,
            "bytes": sum(file.size_bytes for file in manifest.files),
            "record_bytes": manifest.primaries[0].record_size_bytes,
            "expert_bytes": manifest.primary_bytes,
            "record_layout": manifest.record_layout,
            "profile_sha256": manifest.profile_sha256,
            "buddies_by": None if manifest.buddies is None else manifest.buddies.by,
            "replicas": ", ".join(each.name for each in manifest.cheaper) or "none",
            "tool_version": manifest.tool_version,
        }
        | _lineage_facts(manifest)
        | _policy_facts(manifest)
        | _pruning_facts(manifest)
    )
    details: dict[str, object] = {}
    if manifest.calibration is not None:
        details["calibration"] = manifest.calibration.model_dump(mode="json")
    if manifest.lineage:
        details["lineage"] = [each.model_dump(mode="json") for each in manifest.lineage]
    if manifest.pruning is not None:
        details["pruning"] = manifest.pruning.model_dump(mode="json")
    return Description(
        kind="bundle",
        path=path,
        is_intact=True,
        checked="every hash" if verify else "sizes and headers",
        facts=facts,
        details=details,
    )


def _own_bits(manifest: "BundleManifest") -> str:
    """One number, or how many experts have which."""
    found = manifest.primary_counts
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(f"{bits}: {count}" for bits, count in sorted(found.items()))


def _lineage_facts(manifest: "BundleManifest") -> dict[str, object]:
    if not manifest.lineage:
        return {}
    last = manifest.lineage[-1]
    return {
        "tuned": f"{last.steps} steps of {last.optimizer}, {last.rounding} rounding, "
        f"on {', '.join(last.sources)}",
        "tuned_from": last.parent_sha256,
    }


def _policy_facts(manifest: "BundleManifest") -> dict[str, object]:
    """What answers misses where nothing else is asked for, and what that was measured to cost."""
    calibration, plan = manifest.calibration, manifest.plan
    if calibration is None:
        if plan is None or plan.policy is None:
            return {"policy": "exact"}
        return {"policy": plan.policy, "expected_kl": plan.prediction.kl}

    return {
        "policy": calibration.policy,
        "calibrated_to": f"KL {calibration.max_kl:g} with {calibration.expert_slots} expert slots",
        "calibrated_on": ", ".join(calibration.sources),
        "measured": _measured(calibration.quality),
        **{f"measured_{domain}": _measured(each) for domain, each in calibration.domains.items()},
    }


def _pruning_facts(manifest: "BundleManifest") -> dict[str, object]:
    """What its trained routers leave out, and what that was measured to cost."""
    pruning = manifest.pruning
    if pruning is None:
        return {}
    return {
        "pruning": f"trained to leave out {pruning.rate:.0%} of the experts",
        "pruning_measured": _measured(pruning.quality),
        "pruning_trained_on": ", ".join(pruning.sources),
    }


def _measured(quality: "QualityFigure") -> str:
    low, high = quality.kl_ci95
    return f"KL {quality.kl:.4f} [{low:.4f}, {high:.4f}] over {quality.tokens} tokens"


def _describe_checkpoint(path: Path) -> Description:
    from moe_tool.models.architecture import open_model
    from moe_tool.models.locate import LocatedModel

    opened = open_model(LocatedModel(folder=path, name=path.resolve().name))
    with opened.checkpoint:
        facts: dict[str, object] = (
            _model_facts(opened.identity)
            | _shape_facts(opened.shape)
            | {"bytes": opened.checkpoint.total_bytes, "tensors": len(opened.checkpoint.tensors)}
        )
    return Description(
        kind="checkpoint",
        path=path,
        is_intact=True,
        checked="headers; a checkpoint carries no hashes",
        facts=facts,
    )


def _unfinished(path: Path, kind: str, remedy: str) -> Description:
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return Description(
        kind=kind,
        path=path,
        is_intact=False,
        checked=f"it was never finished: go on with {remedy}",
        facts={"bytes": size},
    )


def _model_facts(identity: ModelIdentity) -> dict[str, object]:
    return {
        "model": identity.name,
        "model_type": identity.model_type,
        "identity": identity.quick,
        "full_identity": identity.full,
    }


def _shape_facts(shape: MoeShape) -> dict[str, object]:
    return {
        "decoder_layers": shape.n_decoder_layers,
        "layers": len(shape.layers),
        "experts": shape.experts,
        "top_k": shape.top_k,
        "dtype": shape.dtype,
    }


def _unknown(path: Path) -> CorruptArtifactError:
    return CorruptArtifactError(
        f"{path} is no profile, buddy map, plan, hardware profile, trace of a run, bundle or "
        "checkpoint",
        hint="a checkpoint folder has a config.json, a bundle a manifest.json",
    )
